"""The hot operations, one file a device family; `plain` is always there."""
