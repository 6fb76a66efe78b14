"""A look into a file of pairs before anything is trained on it: `python data.py inspect PATH [--sheet FILE.png]`."""

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

import config
import data
import report


def contact_sheet(samples: list, file: str) -> None:
    """The pairs one under the other as a PNG: candidates side by side, videos as strips, and the text under them."""
    sheet, top = Image.new("RGB", (960, (report.SIDE + 240) * len(samples)), "white"), 4
    for sample in samples:
        width = 960 // len(sample.media)
        shots = [ImageOps.contain(report.strip(item), (width - 8, report.SIDE), Image.Resampling.NEAREST) for item in sample.media]
        for k, shot in enumerate(shots):
            sheet.paste(shot, (4 + k * width, top))
        said = [f"{sample.id}  {sample.task}: {report.verdict(sample.task, sample.label)}", sample.prompt or sample.problem, *sample.answers]
        wrapped = [textwrap.wrap(text, 160) for text in said]  # a long prompt: its beginning, and its end, where a caption often stands
        lines = [line for text in wrapped for line in (text if len(text) < 5 else text[:2] + text[-2:])]
        below = top + max(shot.height for shot in shots) + 4
        ImageDraw.Draw(sheet).text((4, below), "\n".join(lines), "black", spacing=4)
        top = below + 14 * len(lines) + 16
    sheet.crop((0, 0, 960, top)).save(file, "png")


def inspect(arguments: list) -> None:
    """`python data.py inspect PATH`: bad rows; pairs, labels and median and longest text (in characters) per task; the first dozen as pictures."""
    options, bad = dict(zip(arguments[1::2], arguments[2::2])), []
    own = config.Data(image_root=options.pop("--image-root", ""), media_within=options.pop("--media-within", ""))
    file = options.pop("--sheet", "contact_sheet.png")
    if options or len(arguments) % 2 == 0 or not Path(file).resolve().parent.is_dir():
        raise config.UserError("python data.py inspect PATH [--sheet FILE.png, in a folder that exists] "
                               "[--image-root FOLDER] [--media-within FOLDER]")
    samples = data.read_rows(arguments[0], lambda row, folder: data.usable(row, folder, own), bad=bad, label="reading")
    print("".join(f"bad row: {line}\n" for line in bad) + f"{arguments[0]}: {len(samples)} pairs, {len(bad)} bad rows")
    print(f"{'':<20}" + "".join(f"{head:>10}" for head in ("pairs", "first", "second", "ties", "prompt", "longest", "answer", "longest")))
    for task in dict.fromkeys(sample.task for sample in samples):
        rows = [sample for sample in samples if sample.task == task]
        cells = [len(rows)] + [sum(s.label == label for s in rows) for label in (1, 2, 0)]
        for texts in ([s.prompt or s.problem for s in rows], [text for s in rows for text in s.answers]):
            lengths = sorted(map(len, texts)) or ["-"]
            cells += [lengths[len(lengths) // 2], lengths[-1]]
        print(f"{task:<20}" + "".join(f"{cell:>10}" for cell in cells))
    if samples:
        contact_sheet(samples[:12], file)
        print(f"the first {len(samples[:12])} of them: {file}")
