"""What is kept of a video on disk, so that it goes on after a stop or becomes longer when it is finished."""
