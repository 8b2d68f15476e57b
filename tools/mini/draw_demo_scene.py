# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Draw paddlemix/demo_images/emu3_scene.png: the scene, held out of training, that `make demo` asks about."""

from pathlib import Path

from PIL import Image
from world import Scene, Thing, held_out, render

SCENE = Scene(
    64, 64, ("white",), (Thing("circle", "red", "large", 16, 32), Thing("triangle", "blue", "large", 48, 32))
)  # fmt: skip
TARGET = Path(__file__).resolve().parents[2] / "paddlemix" / "demo_images" / "emu3_scene.png"

if __name__ == "__main__":
    if not held_out(SCENE):
        raise SystemExit("error: the demo scene is not held out of training: choose another")
    Image.fromarray(render(SCENE)).save(TARGET, optimize=True)
