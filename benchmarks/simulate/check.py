from pathlib import Path
def check_stages(out: Path, *, quick: bool) -> int:
    return 0
