# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Train the vision tokenizer on scenes and on crops of the photographs of scikit-image and scikit-learn.

First without a codebook, then with one that starts as the k-means centres of the latents and follows them as
running means (van den Oord et al., arXiv 1711.00937, appendix A.1); codewords that nothing chooses begin anew
at some latent. Running means crowd where latents do, so that a plain background gets a hundred codewords that mean the
same and that the language model could only guess among. At last the codebook is therefore laid anew over latents
of which crowded ones count less, and kept. Photographs get more codewords after that, which scenes hardly ever choose,
and the decoder is trained alone. `--out` holds checkpoints; a run that was cut short goes on from the last.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import ConvMuon, descend, encoder_of, learning_rate, load, need, psnr, resume, save, save_training
from PIL import Image
from torch_vision import CONFIG, VisionTokenizer
from tqdm import tqdm
from world import CANVASES, random_scene, render

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = (  # chelsea, the cat, is the demo picture: never among these
    "astronaut.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "retina.jpg", "ihc.png", "brick.png",
    "grass.png", "gravel.png", "camera.png", "coins.png",
)  # fmt: skip
DECAY = 0.98
APART = 0.12  # of the latents' standard deviation: nearer ones count as one when the codebook is laid
FIRM = 3  # times locality and commitment once the codebook is kept
TRAINED = {**CONFIG, "codebook_size": 8192}  # the other codewords are for photographs alone
LARGE = 208  # pixels a side of the photographs that polish the decoder


def photographs(least_side):
    """The photographs, uint8 [height, width, 3] each, at full size, a half, a third and a quarter."""
    import skimage
    import sklearn

    paths = [Path(skimage.__file__).parent / "data" / name for name in PHOTOS]
    paths += [Path(sklearn.__file__).parent / "datasets" / "images" / name for name in ("china.jpg", "flower.jpg")]
    photos = []
    for path in paths:
        image = Image.open(path).convert("RGB")
        for k in (1, 2, 3, 4):
            small = image.resize((image.width // k, image.height // k), Image.LANCZOS)
            photos.append(np.asarray(small))
    return [p for p in photos if min(p.shape[:2]) >= least_side]


def to_tensor(pictures):
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def crop(photo, height, width, rng):
    top, left = (int(rng.integers(n - side + 1)) for n, side in zip(photo.shape, (height, width)))
    part = photo[top : top + height, left : left + width]
    return part[:, ::-1] if rng.random() < 0.5 else part


def batch(rng, photos, count, scenes=1 / 2, canvas=None):
    """A share of scenes, the others crops of photographs, of one size: [count, 3, height, width]"""
    canvas = canvas or CANVASES[rng.choice(3, p=[0.6, 0.2, 0.2])]
    pictures = [
        render(random_scene(rng, canvas=canvas, held=False)) if i < int(scenes * count + 0.5)
        else crop(photos[rng.integers(len(photos))], *canvas, rng)
        for i in range(count)
    ]  # fmt: skip
    return to_tensor(pictures)


def mix(rng, pixels):
    """The same pictures with a part of another one in each, and which latents see no difference within 8 pixels.

    Pixels [B, 3, H, W] and bool [B, H/8, W/8].
    """
    mixed, (_, _, height, width) = pixels.clone(), pixels.shape
    for i, other in enumerate(torch.roll(pixels, 1, 0)):
        rows, columns = (sorted(rng.choice(side // 8 + 1, 2, replace=False) * 8) for side in (height, width))
        part = (slice(None), slice(*rows), slice(*columns))
        mixed[i][part] = other[part]
    changed = F.max_pool2d((mixed != pixels).any(dim=1, keepdim=True).float(), 8)
    return mixed, F.max_pool2d(changed, 3, stride=1, padding=1).squeeze(1) == 0


def thinned(latents, apart):
    """Latents [n, dim] of which no two are nearer than `apart`."""
    kept = latents[:1]
    for latent in latents.split(128):
        latent = latent[torch.cdist(latent, kept).min(1).values > apart]
        near = torch.cdist(latent, latent) <= apart
        free = torch.ones(len(latent), dtype=torch.bool)
        for i in range(len(latent)):
            free[i + 1 :] &= ~(near[i, i + 1 :] & free[i])
        kept = torch.cat([kept, latent[free]])
    return kept


def nearest(latents, codewords):
    """Of each latent [n, dim] the distance to the nearest codeword [m, dim], and its number."""
    found = [torch.cdist(part, codewords).min(1) for part in latents.split(4096)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def recentred(centres, latents, number):
    """Means of the latents [n, dim] of each number, the centres where there are none; and how many each has."""
    count = torch.bincount(number, minlength=len(centres)).float()
    sums = torch.zeros_like(centres).index_add_(0, number, latents)
    return torch.where(count[:, None] > 0, sums / count.clamp(min=1)[:, None], centres), count


class Codebook:
    """Running means of the latents that choose each codeword."""

    def __init__(self, embedding):
        self.embedding = embedding
        self.count = torch.ones(embedding.num_embeddings)
        self.total = embedding.weight.data.clone()

    def start(self, latents, rounds=15):
        """k-means centres of latents [n, dim]."""
        size = len(self.count)
        some = torch.randperm(len(latents))[:size] if len(latents) >= size else torch.randint(len(latents), (size,))
        centres = latents[some]
        for _ in range(rounds):
            centres, count = recentred(centres, latents, nearest(latents, centres)[1])
            empty = count == 0
            centres[empty] = latents[torch.randint(len(latents), (int(empty.sum()),))]
        self.count, self.total = torch.ones(size), centres.clone()
        self.embedding.weight.data.copy_(centres)

    @torch.no_grad()
    def follow(self, latents, codes, revive):
        size = len(self.count)
        self.count.mul_(DECAY).add_(torch.bincount(codes, minlength=size).float(), alpha=1 - DECAY)
        self.total.mul_(DECAY).index_add_(0, codes, latents, alpha=1 - DECAY)
        if revive:
            dead = self.count < 0.02 * len(latents) / size
            number = int(dead.sum())
            self.total[dead] = latents[torch.randint(len(latents), (number,))]
            self.count[dead] = 1.0
            self.total[dead] += 1e-3 * torch.randn(number, latents.shape[1]) * latents.std()
        self.embedding.weight.data.copy_(self.total / self.count.clamp(min=1e-5)[:, None])


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def reconstruction_loss(out, pixels):
    return (out - pixels).abs().mean() + 4 * ((out - pixels) ** 2).mean()


def make_optimizers(weights):
    """Muon for the convolutions inside, Adam for the others. Their learning rate is set at each step."""
    inner = [w.ndim == 4 and min(w.shape[:2]) > CONFIG["z_channels"] for w in weights]
    rest = [w for w, is_inner in zip(weights, inner) if not is_inner]
    adam = torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    return [ConvMuon([w for w, is_inner in zip(weights, inner) if is_inner]), adam]


class Progress:
    """What a run prints: the held-out scenes' and the demo photograph's PSNR, and how local codes are."""

    def __init__(self):
        rng = np.random.default_rng(1)
        self.scenes = to_tensor([render(random_scene(rng, canvas=(64, 64), held=True)) for _ in range(48)])
        self.mixed, self.same = mix(rng, self.scenes)
        photo = Image.open(ROOT / "paddlemix" / "demo_images" / "emu3_demo.png").convert("RGB").resize((312, 208))
        self.photo = to_tensor([np.asarray(photo)])

    @torch.no_grad()
    def line(self, model):
        codes = model.encode(self.scenes)
        local = (codes == model.encode(self.mixed))[self.same].float().mean()
        scenes, photo = psnr(model.decode(codes), self.scenes), psnr(model.decode(model.encode(self.photo)), self.photo)
        return (
            f"held-out scenes {scenes:.2f} dB, photograph {photo:.2f} dB, codes that only see their place {local:.3f}"
        )


@torch.no_grad()
def extend(args):
    """Give photographs the rest of the codewords: centres of their latents, those first that are no scene's."""
    rng, photos, model = np.random.default_rng([args.seed, 2]), photographs(LARGE), VisionTokenizer()
    trained, book = need(f"{args.out}/trained.pt")["model"], model.quantize.embedding.weight
    done = load(f"{args.out}/vision.pt")
    if done and done["of"] == encoder_of(trained):
        return
    old, more = trained["quantize.embedding.weight"], len(book) - TRAINED["codebook_size"]
    model.load_state_dict({**trained, "quantize.embedding.weight": book})
    model.eval()
    torch.manual_seed(args.seed)

    def latents(share, count, canvas):
        parts = [model.latents(batch(rng, photos, 16, share, canvas)) for _ in tqdm(range(count), desc="latents")]
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])

    of_photos, of_scenes = latents(0, 15, (LARGE, LARGE)), latents(1, 250, None)
    far, _ = nearest(of_photos, old)
    new = of_photos[torch.multinomial(far**2, int(1.25 * more))]
    for _ in range(3):
        number = nearest(of_photos, torch.cat([old, new]))[1] - len(old)
        own = number >= 0
        new, count = recentred(new, of_photos[own], number[own])
    number = nearest(of_scenes, torch.cat([old, new]))[1] - len(old)
    count[number[number >= 0].unique()] = -1  # a scene's: those go first
    new = new[count.argsort(descending=True)[:more]]
    book.copy_(torch.cat([old, new]))
    save(f"{args.out}/vision.pt", of=encoder_of(trained), model=model.state_dict())
    print(f"{len(new)} codewords for photographs: {Progress().line(model)}")


def polish(args):
    """Train the decoder alone, on codes that no longer change: what the language model has learnt stays true."""
    torch.manual_seed(args.seed)
    photos, model, progress = photographs(LARGE), VisionTokenizer(), Progress()
    trained = need(f"{args.out}/vision.pt")["model"]
    model.load_state_dict(trained)
    model.train()
    weights = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
    optimizers = make_optimizers(weights)
    of = {"encoder": encoder_of(trained), "seed": args.seed}
    first = resume(f"{args.out}/polished.pt", of, model, optimizers)["step"]
    bar = tqdm(range(first, args.polish_steps), initial=first, total=args.polish_steps, mininterval=5)
    for step in bar:
        rng, loss = np.random.default_rng([args.seed, 1, step]), 0.0
        scenes, crops = batch(rng, photos, args.batch // 4, 1), batch(rng, photos, args.batch // 6, 0, (LARGE, LARGE))
        for pixels, weight in ((scenes, 1 / 4), (crops, 1)):  # photographs are the harder part
            with torch.no_grad():
                codes = model.encode(pixels)
            with autocast():
                out = model.decode(codes).float()
            loss = loss + 50 * weight * ((out - pixels) ** 2).mean()
        descend(optimizers, weights, loss, learning_rate(step, args.polish_steps, args.polish_lr))
        if step % 25 == 24 or step == args.polish_steps - 1:
            bar.write(f"polishing {step + 1}: loss {float(loss):.4f}, {progress.line(model)}")
            save_training(f"{args.out}/polished.pt", step + 1, of, model, optimizers)


def train(args):
    torch.manual_seed(args.seed)
    photos, model, progress = photographs(max(map(max, CANVASES))), VisionTokenizer(TRAINED), Progress()
    model.quantize.embedding.weight.requires_grad_(False)
    book = Codebook(model.quantize.embedding)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizers = make_optimizers(weights)
    of = {"config": model.config, "seed": args.seed}
    state = resume(f"{args.out}/trained.pt", of, model, optimizers)
    first = state["step"]
    if first:
        book.count, book.total = state["count"], state["total"]
    model.train()
    used = torch.zeros(model.config["codebook_size"])
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, mininterval=5)
    for step in bar:
        rng = np.random.default_rng([args.seed, step])
        torch.manual_seed(1000003 * args.seed + step)  # a run that is cut short goes on as if it were not
        pixels = batch(rng, photos, args.batch // 2)
        mixed, same = mix(rng, pixels)
        pixels = torch.cat([pixels, mixed])
        with autocast():
            latents = model.latents(pixels).float()
        spread = latents.detach().var(dim=(0, 1, 2)).mean()
        plain, other = latents.chunk(2)
        moved = ((plain - other)[same] ** 2).mean() / spread
        firm = FIRM if step >= args.settle_at else min(1, step / args.quantize_at) ** 4
        loss, quantized = firm * args.locality * moved, latents
        if step >= args.quantize_at:
            flat = latents.detach().reshape(-1, latents.shape[-1])
            if step in (args.quantize_at, args.settle_at):
                with torch.no_grad(), autocast():
                    more = [model.latents(batch(rng, photos, 48)).float().reshape(-1, flat.shape[1]) for _ in range(64)]
                book.start(thinned(torch.cat([flat, *more]), APART * float(spread) ** 0.5))
            codes = model.quantize(latents.detach())
            codewords = model.quantize.embedding(codes).detach()
            loss = loss + firm * args.commitment * ((latents - codewords) ** 2).mean() / spread
            quantized = latents + (codewords - latents).detach()
            if step < args.settle_at:
                book.follow(flat, codes.reshape(-1), revive=step % 50 == 0)
            used.mul_(0.99).add_(torch.bincount(codes.reshape(-1), minlength=len(used)).float())
        with autocast():
            out = model.decode_latents(quantized).float()
        loss = loss + reconstruction_loss(out, pixels)
        descend(optimizers, weights, loss, learning_rate(step, args.steps, args.lr))
        if step % 20 == 19:
            bar.set_postfix_str(f"{psnr(out.detach(), pixels):.1f} dB, moved {float(moved):.4f}")
        if step % 100 == 99 or step == args.steps - 1:
            share = used / used.sum().clamp(min=1)
            perplexity = float(torch.exp(-(share * (share + 1e-9).log()).sum()))
            measured = progress.line(model) if step >= args.quantize_at else "not quantized yet"
            bar.write(f"step {step + 1}: loss {float(loss):.4f}, {measured}, perplexity {perplexity:.0f}")
            save_training(
                f"{args.out}/trained.pt", step + 1, of, model, optimizers, count=book.count, total=book.total
            )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="mini_run", help="checkpoints")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--quantize_at", type=int, default=150, help="the step from which on codes are used")
    parser.add_argument("--settle_at", type=int, default=1000, help="the step that lays the codebook anew, to stay")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=24, help="pictures of 64 x 64 pixels")
    parser.add_argument("--locality", type=float, default=0.3, help="weight of: equal surroundings, equal latents")
    parser.add_argument("--commitment", type=float, default=0.1)
    parser.add_argument("--polish_lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--polish_steps", type=int, default=560, help="for the decoder alone, after the others")
    parser.add_argument("--only_polish", action="store_true")
    args = parser.parse_args()
    if not args.only_polish:
        train(args)
        extend(args)
    polish(args)
