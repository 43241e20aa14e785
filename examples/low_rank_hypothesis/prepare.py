"""SmolLM2-135M and German manual pages in one folder, ready for `probe train`; no model hub needed.

    PYTHONPATH=benchmarks python examples/low_rank_hypothesis/prepare.py FOLDER

Leaves FOLDER/smollm2 (a link to the converted model in the cache) and FOLDER/manpages.jsonl, one page a line.
"""

import json
import sys
from pathlib import Path

from real_models import german_manpages, smollm2


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "smollm2"
    if not model.exists():
        model.symlink_to(smollm2())
    pages = german_manpages().read_text(encoding="utf-8").split("\f")
    lines = [json.dumps({"text": page}, ensure_ascii=False) for page in pages if page.strip()]
    (folder / "manpages.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{model}; {len(lines)} pages in {folder / 'manpages.jsonl'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
