# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Fine-tuning, one loop: rows of prepared data, the loss of their labels, AdamW, checkpoints that it goes on from."""

import math
import shutil
import time
import zlib
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from paddlemix.machine import half_dtype, peak_memory, require_memory
from paddlemix.models.emu3.parallel import Ranks
from paddlemix.processors.prompts import Prompts
from paddlemix.utils import InputError, alone_in, shown

from .datasets import PreparedData, Rows, collate

GOES_ON = "the same command goes on from the last checkpoint, with any number of processes"
MOST_ROWS = 1 << 20  # of a step, whose places are listed


def train(settings, stop, progress=False):
    """Train: an iterator of dicts, each with the "step" that it comes after.

    Of every step "loss", "learning_rate", "grad_norm", "epoch", "tokens", "seconds", "tokens_per_second" and "memory"
    (bytes, the peak of this process); where it is time, "eval_loss", "samples" (paths) or "checkpoint" (a path); and
    "note", a line for the user, of which the first has "max_steps" as well. The first of several processes writes all
    but the notes into log.jsonl.

    Args:
        settings: Settings.
        stop: threading.Event. When it is set, the step that runs is given up, and a checkpoint of the last whole one is
            written.
        progress: show a progress bar while weights are read (on a terminal).

    Raises:
        InputError: what loading raises; data that does not fit the model; a checkpoint of another run; a loss or a
            gradient that is not a number, with the rows that it came from: nothing is written then.
    """
    ranks, folder = Ranks(GOES_ON), Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        ranks.together(lambda: ranks.rank or stack.enter_context(alone_in(folder)))
        yield from _train(settings, ranks, folder, stop, progress)


def _train(settings, ranks, folder, stop, progress):
    import paddle

    from paddlemix.models.emu3.checkpoint import fingerprint

    from .checkpoints import last_checkpoint, load_optimizer, rows_of_step_before, save_checkpoint
    from .curves import Log
    from .loss import next_token_loss
    from .optimizer import AdamW, cosine_with_min_lr

    at_once = settings.per_device_train_batch_size
    config, prompts = open_model(settings)
    settings = replace(settings, dtype=weight_dtype(settings, config))
    data = PreparedData(settings.data_path, prompts.grammar.codebook_size)
    rows = Rows(data, prompts, settings, config.max_position_embeddings)
    if settings.sample_prompt and ranks.rank == 0:
        open_sampler(settings, config, prompts)  # a mistake ends the run now, not after hours
    asked = at_once * settings.gradient_accumulation_steps * ranks.count
    if asked > MOST_ROWS:
        raise InputError(
            f"a step of {asked:,} rows (per_device_train_batch_size x gradient_accumulation_steps x processes): give "
            f"{MOST_ROWS:,} at most"
        )
    count = rows_of_step_before(folder) or asked  # the steps stay what they were, whatever the number of processes
    max_steps = settings.max_steps or math.ceil(settings.num_train_epochs * len(rows.trained) / count)
    job = settings.job(len(data), count, data.digest)
    checkpoint, done = last_checkpoint(folder, job)
    model, weights, write_model = load_model(settings, config, checkpoint, at_once * rows.longest, ranks, progress)
    if settings.lora:  # the model's path may lead to other weights by now
        job["base weights"] = f"{fingerprint(w for w in model.parameters() if w.stop_gradient):08x}"
        last_checkpoint(folder, job)
    optimizer = AdamW(weights, settings.weight_decay, ranks)
    if checkpoint:
        load_optimizer(checkpoint, optimizer)
    log = Log(folder, done) if ranks.rank == 0 else None

    def event(step, **values):
        if log and "note" not in values:
            log.add(step=step, **values)
        return {"step": step, **values}

    def loss_of(some):
        """The sum of the losses of some rows, which are padded to one length."""
        return next_token_loss(model, *map(paddle.to_tensor, collate(some, prompts.grammar.pad)))

    def save(step):
        limit = settings.save_total_limit
        return event(step, checkpoint=str(save_checkpoint(folder, step, job, write_model, optimizer, ranks, limit)))

    def measure(step):
        """The loss of held-out rows and samples, where it is time and log.jsonl does not have them."""
        if step % settings.eval_steps and step != max_steps:
            return
        there = ranks.gather([name for line in log.lines if line["step"] == step for name in line] if log else [])[0]
        model.eval()
        if len(rows.held_out) and "eval_loss" not in there:
            loss = evaluate(rows.of_evaluation(ranks.rank, ranks.count), loss_of, at_once, ranks, stop)
            if loss is not None:
                yield event(step, eval_loss=loss)
        if settings.sample_prompt and "samples" not in there:
            draw = partial(draw_samples, settings, config, prompts, model, step, stop) if ranks.rank == 0 else list
            if paths := ranks.together(draw):
                yield event(step, samples=paths)
        if log and step < max_steps:
            log.draw()

    shares = f"{len(rows.trained)} rows to train, {len(rows.held_out)} held out"
    yield event(done, max_steps=max_steps, note=f"{shares}, {count} a step, {max_steps} steps")
    if data.failed:
        yield event(done, note=f"{data.failed} rows have an error in the data and are left out")
    if count != asked:
        yield event(done, note=f"a step keeps the {count} rows that it began with; these options give {asked}")
    if settings.lora and (settings.image_area or settings.max_position_embeddings):
        text = "image_area and max_position_embeddings are of this run: an adapter has no config.json that keeps them"
        yield event(done, note=text)
    if checkpoint:
        yield event(done, note=f"going on from {checkpoint}")
        yield from measure(done)  # which the end of the run before may have cut off
    saved = done
    for step in range(done, max_steps):
        started = time.perf_counter()
        paddle.seed(zlib.crc32(f"{settings.seed} {step} {ranks.rank}".encode()))  # of dropout
        own = rows.of_step(step, count, ranks.rank, ranks.count)
        counts = sum(row.num_labels for row in own), sum(len(row.ids) for row in own)
        labels, tokens = map(int, ranks.sum_numbers(*counts))
        model.train()
        loss, bad = 0.0, []
        for first in range(0, math.ceil(count / ranks.count), at_once):  # as many backward passes for everyone
            if stops := ranks.sum_numbers(float(stop.is_set()))[0]:
                break
            some = own[first : first + at_once]
            part = loss_of(some or rows.of_step(step, 1)) / labels * bool(some)
            optimizer.backward(part)
            loss += float(part)
            bad += [] if math.isfinite(float(part)) else [row.id for row in some]
        if stops:
            break
        loss = ranks.sum_numbers(loss)[0]
        if not math.isfinite(loss):
            refuse(step, "loss", loss, sum(ranks.gather(bad), []), checkpoint)
        rate = cosine_with_min_lr(step, max_steps, settings.warmup_steps, settings.learning_rate,
                                  settings.min_learning_rate)  # fmt: skip
        norm = optimizer.step(rate, settings.max_grad_norm)
        if not math.isfinite(norm):
            refuse(step, "gradient", norm, sum(ranks.gather([row.id for row in own]), []), checkpoint)
        done, seconds = step + 1, time.perf_counter() - started
        yield event(
            done, loss=loss, learning_rate=rate, grad_norm=norm, epoch=done * count / len(rows.trained), tokens=tokens,
            seconds=seconds, tokens_per_second=tokens / seconds, memory=peak_memory(),
        )  # fmt: skip
        if done % settings.save_steps == 0 or done == max_steps:
            saved = done
            yield save(done)
            checkpoint = folder / f"checkpoint-{done}"
        yield from measure(done)  # last, so that its errors cost nothing
    if saved < done:
        yield save(done)
    if log:
        log.draw()
        log.close()


def evaluate(own, loss_of, at_once, ranks, stop):
    """The mean loss of the labels of all processes' rows; None where it is stopped."""
    import paddle

    @paddle.no_grad()
    def loss_of_own():
        starts = range(0, len(own), at_once)
        return sum(float(loss_of(own[first : first + at_once])) for first in starts if not stop.is_set())

    loss = ranks.together(loss_of_own)
    loss, labels, stops = ranks.sum_numbers(loss, sum(row.num_labels for row in own), float(stop.is_set()))
    return None if stops else loss / labels


def open_sampler(settings, config, prompts):
    """The Emu3Pipeline that draws samples. No weights are read. InputError: a prompt or an area that cannot be, or no
    vision tokenizer that belongs to the model."""
    from paddlemix.models.emu3 import Emu3VisionVQModel
    from paddlemix.pipelines import Emu3Pipeline
    from paddlemix.processors import Emu3Processor
    from paddlemix.processors.prompts import POSITIVE_PROMPT

    emu3 = Emu3Pipeline(settings.model_path, settings.vq_model_path)
    emu3.config = config  # with the area that is asked for
    texts, ratios, area, *_ = emu3.check_generate(list(settings.sample_prompt), seed=settings.seed)
    _ = emu3.defaults
    with closing(Emu3VisionVQModel.open_pretrained(emu3.vq_model_path)) as checkpoint:
        processor = Emu3Processor(emu3.image_processor, checkpoint.model, prompts.tokenizer)
        rows = processor([text + POSITIVE_PROMPT for text in texts], ratio=ratios, image_area=area)["input_ids"]
    longest, positions = max(map(len, rows)), config.max_position_embeddings
    if longest > positions:
        raise InputError(f"a sample_prompt has {longest} tokens, the model has {positions} positions: shorten it")
    return emu3


def draw_samples(settings, config, prompts, model, step, stop):
    """Draw the sample prompts with the model as it is. Returns the paths of the pictures; none where it is stopped."""
    from paddlemix.results import save_picture

    if stop.is_set():
        return []
    emu3, folder = open_sampler(settings, config, prompts), Path(settings.output_dir) / "samples"
    folder.mkdir(exist_ok=True)
    emu3.model, paths = model, []
    drawing = emu3.generate_steps(list(settings.sample_prompt), seed=settings.seed)
    if any(stop.is_set() for _ in drawing):
        return []
    for i, image in enumerate(drawing.images()):
        paths.append(folder / f"step_{step:06d}_{i}.png")
        save_picture(image, paths[-1])
    return list(map(str, paths))


def refuse(step, what, value, ids, checkpoint):
    """End a run whose numbers went bad."""
    kept = f"{checkpoint} is the last good checkpoint" if checkpoint else "there is no checkpoint yet"
    raise InputError(
        f"the {what} of step {step + 1} is {value}, of the rows {shown(ids)}: {kept}; look at these rows, or take a "
        "smaller learning_rate"
    )


def open_model(settings):
    """(Emu3Config, Prompts) of the model that is trained, with what the settings change of it."""
    from paddlemix.models.emu3 import Emu3Config, Emu3Tokenizer
    from paddlemix.models.emu3.image_grammar import ImageGrammar

    changes = {name: getattr(settings, name) for name in ("image_area", "max_position_embeddings")}
    config = Emu3Config.from_pretrained(settings.model_path, **{k: v for k, v in changes.items() if v})
    tokenizer = Emu3Tokenizer.from_pretrained(settings.model_path)
    try:
        config.check_tokenizer(tokenizer)
    except InputError as error:
        raise InputError(f"{settings.model_path}: {error}") from None
    if config.quantized_dtype and not settings.lora:
        raise InputError(
            f"{settings.model_path} is {config.quantized_dtype}, and such weights cannot be trained: add --lora, or "
            "take what it was made from"
        )
    return config, Prompts(tokenizer, ImageGrammar.from_config(config, tokenizer.encode))


def weight_dtype(settings, config):
    """The dtype of the weights, where none is given that of the checkpoint or of the device."""
    import paddle

    dtype = settings.dtype or config.quantized_dtype or (
        "float32" if paddle.get_device() == "cpu" else half_dtype()
    )  # fmt: skip
    if dtype == "float16":
        raise InputError("this card has no bfloat16, and float16 cannot be trained: give dtype float32")
    return dtype


def load_model(settings, config, checkpoint, tokens, ranks, progress):
    """(Emu3ForCausalLM, {name: weight that is trained}, what writes it into a folder)

    tokens: of a forward pass at most. NotEnoughMemory: it takes more than there is.
    """
    import paddle

    from paddlemix.models.emu3 import Emu3ForCausalLM
    from paddlemix.models.emu3.lora import apply_lora, load_lora, lora_state, save_lora
    from paddlemix.models.emu3.needs import training_bytes
    from paddlemix.models.emu3.tokenization_emu3 import files_beside

    dtype, rank = settings.dtype, settings.lora_rank if settings.lora else 0
    activation = 4 if paddle.get_device() == "cpu" or dtype == "float32" else 2
    parts = training_bytes(
        config, dtype, tokens, rank, settings.recompute, ranks.count, activation, settings.lora_dropout
    )
    purpose = f"to train {settings.model_path} in {dtype} with {tokens} tokens at once (GB: " + ", ".join(
        f"{name} {size / 1e9:.1f}" for name, size in parts.items()
    )
    require_memory(sum(parts.values()), f"{purpose}; --recompute, --lora or fewer rows at once take less)")
    files = files_beside(settings.model_path)
    path = settings.model_path if settings.lora else checkpoint or settings.model_path
    model = Emu3ForCausalLM.from_pretrained(path, dtype=dtype, config=config, progress=progress)
    if settings.recompute:
        model.recompute_enable()
    if settings.lora and checkpoint:
        load_lora(model, checkpoint)
    elif settings.lora:
        apply_lora(model, settings.lora_config, settings.seed)

    def write(folder):
        if settings.lora:
            save_lora(model, folder, settings.model_path)
            return
        model.save_pretrained(folder)
        for file in files:
            shutil.copyfile(file, folder / file.name)

    return model, lora_state(model) if settings.lora else dict(model.named_parameters()), write
