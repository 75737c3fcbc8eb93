"""What outlives a call, found again from the tensors: planes beside static caches, growing buffers in place of `cat`."""
