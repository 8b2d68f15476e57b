# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a training run has measured: lines of JSON, and the same as curves."""

import json
import os
import shutil
from pathlib import Path

from paddlemix.utils import InputError, replacing

LOG, FIGURE, VISUALDL = "log.jsonl", "curves.png", "visualdl"
SHOWN = {
    "loss": "loss", "learning_rate": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens/s",
}  # fmt: skip


class Log:
    """`log.jsonl` of a folder, one line a step, and VisualDL's log of the same numbers.

    Args:
        folder: of the run.
        step: steps that are done; lines of later ones, of a run that was killed, are taken away.
    """

    def __init__(self, folder, step):
        from visualdl import LogWriter

        self.folder, self.path = Path(folder), Path(folder) / LOG
        self.lines = [line for line in read_log(self.path) if line["step"] <= step]
        with replacing(self.path) as temporary:
            Path(temporary).write_text("".join(map(_as_text, self.lines)), encoding="utf-8")
        shutil.rmtree(self.folder / VISUALDL, ignore_errors=True)
        self.writer = LogWriter(str(self.folder / VISUALDL))
        for line in self.lines:
            self._add_scalars(line)

    def add(self, **values):
        self.lines.append(values)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_as_text(values))
        self._add_scalars(values)

    def _add_scalars(self, values):
        for name, value in values.items():
            if name != "step" and isinstance(value, (int, float)):
                self.writer.add_scalar(tag=name, step=values["step"], value=float(value))

    def draw(self):
        """Write `curves.png`."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 7), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (name, title) in zip(figure.subplots(2, 2).flat, SHOWN.items(), strict=True):
            for key, label in ((name, "training"), (f"eval_{name}", "held out")):
                points = [(line["step"], line[key]) for line in self.lines if key in line]
                if points:
                    axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else None)
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
            if name == "loss":
                axes.legend()
        with replacing(self.folder / FIGURE) as temporary:
            figure.savefig(temporary, dpi=100, format="png")

    def close(self):
        self.writer.close()


def read_log(path):
    """The lines of a log; the last one may have been cut off by a kill. InputError: it is not of a training run."""
    if not os.path.exists(path):
        return []
    texts, lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), []
    for i, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except ValueError:
            if i == len(texts):
                break
            line = None
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            raise InputError(f"{path}, line {i}, is not of `emu3 train`: give another --output_dir")
        lines.append(line)
    return lines


def _as_text(values):
    return json.dumps(values) + "\n"
