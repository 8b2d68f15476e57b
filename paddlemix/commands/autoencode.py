# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Reconstruct an image, or a video's frames: encode it with the vision tokenizer, and decode it."""

from pathlib import Path

from .console import Loading, Stopwatch, make_parser, progress_bar, say
from .files import frame_paths, load_pictures, save_picture, side_by_side, write_stats, wrote

DEMO_IMAGE = "paddlemix/demo_images/emu3_demo.png"


def parser(prog=None):
    parser = make_parser(__doc__, prog)
    parser.add_argument(
        "--model_path", default="BAAI/Emu3-VisionTokenizer", help="a directory, a hub name, or emu3-mini"
    )
    parser.add_argument("--image_path", help="a picture (default: the demo picture, if there is no --video_path)")
    parser.add_argument("--video_path", help="a folder of frames, pictures of one size in the order of their names")
    return parser


def main(args):
    from paddlemix.models.emu3 import Emu3VisionVQModel
    from paddlemix.processors.image_processing_emu3 import Emu3VisionVQImageProcessor

    with Loading() as load:
        processor = Emu3VisionVQImageProcessor.from_pretrained(args.model_path)
        frames = load_pictures(frame_paths(args.video_path), processor) if args.video_path else []
        jobs = {}
        if args.image_path or not frames:
            jobs["recon_image"] = processor(load_pictures([args.image_path or DEMO_IMAGE], processor))["pixel_values"]
        if frames:
            jobs["recon_video"] = video_pixels(processor, frames)
        model = Emu3VisionVQModel.from_pretrained(args.model_path)

    written, stats = [], {"encode_s": 0.0, "decode_s": 0.0}
    for name, pixels in jobs.items():
        clips = as_clips(pixels, model.config.temporal_downsample_factor) if name == "recon_video" else [pixels]
        decoded = [picture for clip in clips for picture in reconstruct(model, clip, stats)]
        pairs = zip(processor.postprocess(pixels)["pixel_values"], decoded, strict=True)
        for i, (original, pixels_back) in enumerate(pairs):
            picture = processor.postprocess(pixels_back)["pixel_values"][0]
            comparison, ratio = side_by_side(original, picture)
            path = Path(args.output_dir) / (f"{name}.png" if name == "recon_image" else f"{name}_{i}.png")
            written += [path, path.with_stem(f"{path.stem}_compare")]
            save_picture(picture, written[-2])
            save_picture(comparison, written[-1])
            say(f"{path.name}: {picture.width} x {picture.height} pixels, PSNR {ratio:.2f} dB")
    say(f"encoded in {stats['encode_s']:.2f} s, decoded in {stats['decode_s']:.2f} s")
    write_stats(args, **stats, seconds=sum(stats.values()), load_s=load.seconds)
    wrote(written)


def video_pixels(processor, frames):
    """Frames of one size -> [T, 3, H, W]"""
    from paddlemix.utils import InputError

    sizes = sorted({f"{frame.width}x{frame.height}" for frame in frames})
    if len(sizes) > 1:
        raise InputError(f"--video_path holds frames of different sizes, {', '.join(sizes[:4])}: give one size")
    return processor(frames)["pixel_values"]


def as_clips(pixels, frames):
    """Video [T, 3, H, W] -> clips [1, frames, 3, H, W], each encoded by itself as in the original."""
    from paddlemix.utils import InputError

    if len(pixels) % frames:
        raise InputError(
            f"--video_path holds {len(pixels)} frames and the model takes multiples of {frames}: "
            f"remove {len(pixels) % frames} or add {-len(pixels) % frames}"
        )
    return pixels.reshape(-1, 1, frames, *pixels.shape[1:])


def reconstruct(model, clip, stats):
    """Pixels -> codes -> pixels, a numpy array [frames, 3, H, W]; the seconds are added to `stats`."""
    import paddle

    with paddle.no_grad(), progress_bar(2, "pass", f"{clip.shape[-1]} x {clip.shape[-2]}") as bar:
        with Stopwatch() as encode:
            codes = model.encode(paddle.to_tensor(clip))
            codes.numpy()  # waits for the device
        bar.update()
        with Stopwatch() as decode:
            pixels = model.decode(codes).numpy()
    stats["encode_s"] += encode.seconds
    stats["decode_s"] += decode.seconds
    return pixels.reshape(-1, *pixels.shape[-3:])
