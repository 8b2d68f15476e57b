# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Whether two sides' results are equal. They may differ by rounding, and where it decides between two nearly equal."""

import math

import numpy as np

TIE = 1e-4  # two values nearer than this, relative to their size, may be ordered by rounding


def compare_codes(ours, peer, latents, codebook):
    """(equal but for ties, a sentence). A tie: two codewords equally near to the peer's latent."""
    ours, peer = ours.ravel(), peer.ravel()
    places = np.flatnonzero(ours != peer)
    text = f"{len(ours) - len(places)} of {len(ours)} codes equal ({len(np.unique(peer))} distinct)"
    if not len(places):
        return True, text
    z, a, b = (x.astype(np.float64) for x in (latents[places], codebook[ours[places]], codebook[peer[places]]))
    scale = (z**2).sum(1) + (b**2).sum(1)
    gaps = np.abs(((z - a) ** 2).sum(1) - ((z - b) ** 2).sum(1)) / scale
    largest = f"the two codewords' squared distances differ by {gaps.max():.1e} of their size at most"
    return bool(gaps.max() < TIE), f"{text}; elsewhere {largest}"


def compare_pixels(ours, peer):
    """(equal but for rounding, a sentence)"""
    error = float(np.abs(ours - peer).max() / np.abs(peer).max())
    return error < 1e-3, f"decoded pixels differ by {error:.1e} of the largest"


def compare_tokens(ours, peer, top_codes, top_logits):
    """(equal up to a tie, a sentence). After a tie the two go on from different tokens."""
    ours, peer = ours.ravel(), peer.ravel()
    scale = np.abs(top_logits).max()
    clear = f"least gap between the best two guided logits {(top_logits[:, 0] - top_logits[:, 1]).min():.1e}"
    if (ours == peer).all():
        return True, f"all {len(ours)} greedy tokens equal ({len(np.unique(peer))} distinct; {clear})"
    place = int(np.flatnonzero(ours != peer)[0])
    found = np.flatnonzero(top_codes[place] == ours[place])
    gap = float(top_logits[place, 0] - top_logits[place, found[0]]) / scale if len(found) else math.inf
    text = (
        f"first {place} of {len(ours)} greedy tokens equal; there the guided logits of the two sides' tokens differ by "
    )
    text += f"{gap:.1e} of the largest logit"
    return gap < TIE, text
