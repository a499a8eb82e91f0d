"""How a video is made, as one process sees it: requests, schedule, work order, sampling, reuse and KV buffers."""
