"""What ranks do together: `distributed` over torch.distributed, `shm` over memory shared by one machine's ranks."""
