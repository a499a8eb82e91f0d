"""Where a video is made: pipeline stages and context-parallel ranks over torch.distributed."""
