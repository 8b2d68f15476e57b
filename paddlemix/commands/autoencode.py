# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Reconstruct an image, or a video's frames: encode it with the vision tokenizer, and decode it."""

from contextlib import ExitStack
from pathlib import Path

from paddlemix.results import save_picture
from paddlemix.utils import replacing

from .console import Loading, make_parser, progress_bar, say
from .files import (
    frame_paths,
    load_pictures,
    refuse_to_overwrite,
    side_by_side,
    write_stats,
    wrote,
)
from .language_model import note_vision

DEMO_IMAGE = "paddlemix/demo_images/emu3_demo.png"


def parser(prog=None):
    parser = make_parser(__doc__, prog)
    parser.add_argument(
        "--model_path", default="BAAI/Emu3-VisionTokenizer", help="a directory, a hub name, or emu3-mini"
    )
    parser.add_argument("--image_path", help="a picture (default: the demo picture, if there is no --video_path)")
    parser.add_argument(
        "--video_path", help="a folder of frames, pictures of one size in the order of their names; or a video, such "
        "as clip.mp4, which needs pip install av==17.1.0"
    )  # fmt: skip
    return parser


def main(args):
    from paddlemix.pipelines import Emu3Pipeline
    from paddlemix.processors.video import VideoFile, frame_rate, read_frames

    folder, ends = Path(args.output_dir), ("", "_compare")
    refuse_to_overwrite([folder / f"recon_image{end}.png" for end in ends], filter(None, [args.image_path]))
    is_clip = args.video_path is not None and Path(args.video_path).is_file()
    files = frame_paths(args.video_path) if args.video_path and not is_clip else []
    rate, count = frame_rate(args.video_path) if is_clip else (None, len(files))
    names = [folder / f"recon_video_{i}{end}.png" for i in range(len(files)) for end in ends]
    clip = folder / "recon_video.mp4" if is_clip else None
    refuse_to_overwrite([*names, *filter(None, [clip])], files or filter(None, [args.video_path]))
    with Loading() as load:
        emu3 = Emu3Pipeline(vq_model_path=args.model_path, progress=True)
        processor = emu3.image_processor
        frames = read_frames(args.video_path) if is_clip else load_pictures(files, processor)
        shows_video, image_path = args.video_path is not None, args.image_path
        images = [] if shows_video and not image_path else load_pictures([image_path or DEMO_IMAGE], processor)
        jobs = [("recon_image", {"image": images})] if images else []
        jobs += [("recon_video", {"video": frames})] if shows_video else []
        steps = [(name, emu3.autoencode_steps(**what)) for name, what in jobs]
        note_vision(emu3.vision_tokenizer)
    written, stats = [], {"encode_s": 0.0, "decode_s": 0.0}
    with progress_bar(len(images) + count, " pictures", "reconstructing") as bar, ExitStack() as stack:
        for name, reconstructions in steps:
            for i, one in enumerate(reconstructions):
                bar.update()
                path = folder / (f"{name}.png" if name == "recon_image" else f"{name}_{i}.png")
                written += [path, path.with_stem(f"{path.stem}_compare")]
                save_picture(one.image, written[-2])
                save_picture(side_by_side(one), written[-1])
                if clip and name == "recon_video":
                    if i == 0:
                        video = stack.enter_context(VideoFile(stack.enter_context(replacing(clip)), rate))
                    video.add(one.image)
                say(f"{path.name}: {one.image.width} x {one.image.height} pixels, PSNR {one.psnr:.2f} dB")
                stats["encode_s"] += one.encode_s
                stats["decode_s"] += one.decode_s
    say(f"encoded in {stats['encode_s']:.2f} s, decoded in {stats['decode_s']:.2f} s")
    wrote([clip, f"{len(written)} pictures beside it"] if clip else written)
    write_stats(args, **stats, seconds=sum(stats.values()), load_s=load.seconds)
