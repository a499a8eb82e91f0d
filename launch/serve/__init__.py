"""Videos over HTTP: `flowcache serve`. Needs the extra `serve`."""
