"""What task=doctor looks at: a file for the packages, one for the machine, one for what a job would use of it."""
