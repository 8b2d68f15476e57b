# Licensed under the Apache License, Version 2.0; see LICENSE.
"""One thread that owns the models and works for many requests at once (continuous batching). It knows no HTTP.

A job waits in a queue, first come, first served, until the batch of its model has rows for it. Between two passes jobs
join and leave, and pictures are encoded and decoded. A result is that of Emu3Pipeline with the same values, bit for bit
on a CPU, whatever else runs.
"""

import hashlib
import logging
import math
import threading
import time
import traceback
from collections import OrderedDict
from contextlib import contextmanager, suppress

from paddlemix.machine import NotEnoughMemory, RankLost, available_cores
from paddlemix.paddle_private import num_threads, set_num_threads
from paddlemix.processors.image_processing_emu3 import over_white, to_pil
from paddlemix.results import save_results
from paddlemix.utils import InputError, shown, whole_number

from .jobs import Chat, Decode, Done, Draw, Drawn, Encode, Failed, Job, Partial, Progress, Queued, Text, Written
from .records import Records

__all__ = [
    "Busy", "Chat", "Decode", "Done", "Draw", "Drawn", "Encode", "Engine", "Failed", "Job", "Partial", "Progress",
    "Queued", "Text", "Unavailable", "Written",
]  # fmt: skip

MOST_CODES = 1 << 20  # of pictures of questions that are remembered
PREVIEW_SHARE, PREVIEW_SAVED_S = 0.1, 1.0  # of the time; an idle server saves up so much of it
ADMIT_S = 0.05  # after which no more jobs are prepared before the next pass
log = logging.getLogger(__name__)


class Busy(Exception):
    """The queue is full. `retry_after`: seconds."""

    def __init__(self, text, retry_after):
        super().__init__(text)
        self.retry_after = retry_after


class Unavailable(Busy):
    """The engine loads, drains or has failed, or the model cannot be loaded."""


class Engine:
    """Emu3 for many requests at once.

    Args:
        pipelines: {name: Emu3Pipeline}. The first is loaded at the start, others when they are first asked for, where
            memory allows. Several names may share one.
        max_batch: rows of a model's batch; a picture with guidance has two. Never more than one pass takes.
        max_queue: jobs that wait.
        prefix_tokens: of the cache, for prompts of answers that are kept (decoding.Batch).
        output_dir: a folder that finished pictures are written to as well. What was accepted and not finished when the
            process ended is drawn at the next start.

    `state` is "loading", "ready", "draining" or "failed"; `reason` then the line that says why. Where the pipelines
    have ranks, the other processes follow the batches of this one, and the engine fails when one of them ends.
    """

    def __init__(self, pipelines, *, max_batch=16, max_queue=64, prefix_tokens=16_384, output_dir=None):
        self.pipelines, self.prefix_tokens = dict(pipelines), prefix_tokens
        self.max_batch = whole_number("max_batch", max_batch, "1 or more, a whole number", 1)
        self.max_queue = whole_number("max_queue", max_queue, "1 or more, a whole number", 1)
        self.output_dir, self.records = output_dir, None if output_dir is None else Records(output_dir)
        self.state, self.reason = "loading", None
        self.threads = num_threads() or available_cores()  # that the caller has set; a new thread has its own number
        self.previews = Previews()
        self._thread = threading.Thread(target=self._main, name="emu3-engine", daemon=True)
        self._changed, self._stops = threading.Condition(), False
        self._queue, self._running, self._batches = [], [], {}
        self._codes, self._average_s = OrderedDict(), 1.0
        self._counts = dict.fromkeys(
            ("batch_rows", "tokens_total", "prompt_tokens_total", "cached_tokens_total", "pictures_total"), 0
        )

    # --- from any thread

    def start(self):
        self._thread.start()

    def submit(self, job):
        """Put a job into the queue.

        Raises:
            InputError: what can be seen to be wrong without the model.
            Busy: the queue is full.
            Unavailable: the engine loads, drains or has failed.
        """
        job.pipeline = self.pipelines.get(job.pipeline_name)
        if job.pipeline is None:
            raise InputError(f"unknown model {shown(job.pipeline_name)}: there are {', '.join(self.pipelines)}")
        self._require_open()
        job.check(job.pipeline)
        with self._changed:
            self._require_open()
            if len(self._queue) >= self.max_queue:
                seconds = math.ceil(self._average_s / max(1, len(self._running)))
                raise Busy(f"{len(self._queue)} requests wait already: try again later", max(1, min(600, seconds)))
            self._record(job)
            self._put(job)

    def cancel(self, job):
        """Let a job go: its work ends within a pass, and no event of it comes after this one's return but one that is
        on its way."""
        with self._changed:
            job.cancelled = True
            self._changed.notify_all()

    def drain(self, seconds):
        """Take no more, wait until all is done or the time is over, and end the thread; what is left fails."""
        with self._changed:
            self.state = "draining"
            self._changed.wait_for(lambda: not self._queue and not self._running, seconds)
            self._stops = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(30)  # a pass, or a picture that is decoded

    def stats(self):
        """{name: number}: what waits, what runs, what was done."""
        return {"queue_depth": len(self._queue), "running": len(self._running), **self._counts}

    def _require_open(self):
        if self.state != "ready":
            reason = {"loading": "the model is being loaded", "draining": "the server is stopping"}.get(self.state)
            raise Unavailable(reason or self.reason, 10)

    def _record(self, job):
        if self.records is None or not isinstance(job, Draw):
            return
        try:
            self.records.put(job.id, job.record())
        except OSError as error:
            log.warning("request %s: cannot be kept for a restart (%s)", job.id, error.strerror)

    def _put(self, job):
        self._queue.append(job)
        job.since = time.monotonic()
        self._changed.notify_all()

    # --- the engine's thread

    def _main(self):
        try:
            self._begin_thread()
        except Unavailable as error:  # which the caller tells
            self.reason = one_line(error.__cause__)
        except Exception as error:
            self._log_error("the model cannot be loaded", error)
            self.reason = one_line(error)
        with self._changed:
            if self.state == "loading":
                self.state = "failed" if self.reason else "ready"
            if self.reason:
                return
        while True:
            with self._changed:
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue or self._running or self._stops)
                if self._stops:
                    break
            try:
                self._turn()
            except RankLost as error:
                log.error("%s", one_line(error))
                with self._changed:
                    self.state, self.reason = "failed", one_line(error)
                self._batches.clear()
                break
            except Exception as error:  # nobody's in particular
                self._log_error("a pass failed", error)
                self._batches.clear()
                for job in [*self._running, *self._queue[:1]]:
                    self._fail(job, error)
        for job in dict.fromkeys([*self._running, *self._queue]):
            is_kept = self.records is not None and job.id in self.records.files and not job.cancelled
            if is_kept:
                log.warning("request %s: left to the next start", job.id)
            self._forget(job, keep_record=is_kept)
            job.tell(Failed(Unavailable("the server is stopping", 10)))
        if self.records is not None:
            self.records.release()
        if self.state != "failed":
            self._end_others()
        self._batches.clear()

    def _end_others(self):
        from paddlemix.models.emu3.shared_batch import end

        pipeline = next(iter(self._batches), None)
        if pipeline and pipeline.model.ranks:
            with suppress(RankLost):
                for one in end(pipeline.model):
                    log.info("process %d read %d bytes of weights, and had at most %.0f MB in memory", *one.values())

    def _begin_thread(self):
        import paddle

        set_num_threads(self.threads)
        paddle.set_device(paddle.get_device())
        self._batch(next(iter(self.pipelines.values())))
        with self._changed:
            self._recover()

    def _turn(self):
        for job in [job for job in (*self._running, *self._queue) if job.cancelled]:
            self._forget(job)
        self._admit()
        for pipeline, batch in list(self._batches.items()):
            if batch:
                self._step(batch, [job for job in self._running if job.pipeline is pipeline])
        self._counts["batch_rows"] = sum(len(slots) for b in self._batches.values() for slots in b.slots.values())
        places = {}
        for job in [job for job in self._queue if job not in self._running]:
            places[self._lane(job)] = place = places.get(self._lane(job), 0) + 1
            if place != job.place:
                job.place = place
                job.tell(Queued(place))

    @staticmethod
    def _lane(job):
        """Those that wait for rows of one model hold nobody else up."""
        return job.pipeline if job.uses_batch else None

    def _admit(self):
        """Let jobs begin, the first first; where others run, those of a short while between two passes."""
        full, end = set(), time.monotonic() + ADMIT_S
        for job in list(self._queue):
            if self._lane(job) in full:
                continue
            try:
                began = self._begin(job)
            except RankLost:
                raise
            except Exception as error:
                self._fail(job, error)
                continue
            if not began:
                full.add(self._lane(job))
            elif self._running and time.monotonic() > end:
                return

    def _begin(self, job):
        """Let the job's sequences join; whether all of them have."""
        if not job.uses_batch:
            self._load(job.pipeline, lambda: job.pipeline.processor)
            job._prepare(self, None)
            self._finish(job)
            return True
        batch = self._batch(job.pipeline)
        most = min(self.max_batch, batch.pass_rows)
        used = sum(map(len, batch.slots.values()))
        if used >= most:
            return False
        if not job.sequences:
            try:
                self.with_memory(job._prepare, self, batch)
            except NotEnoughMemory:
                if not self._running:
                    raise
                return False
            job.waiting = list(job.sequences)
            self._counts["prompt_tokens_total"] += sum(len(row) for s in job.sequences for row in s.prompts)
        while job.waiting:
            if used and used + job.rows > most:
                return False
            try:
                batch.join(job.waiting[0]) if used else self.with_memory(batch.join, job.waiting[0])
            except (NotEnoughMemory, MemoryError):
                if not self._running:
                    raise
                return False  # until others have left
            del job.waiting[0]
            used += job.rows
            if job not in self._running:
                self._running.append(job)
                job._start()
        with self._changed:
            self._queue.remove(job)
        return True

    def _step(self, batch, jobs):
        try:
            batch.step()
        except RankLost:
            raise
        except Exception as error:  # one of them, or memory for all together: each by itself shows which
            self._log_error("a pass failed", error)
            if isinstance(error, (NotEnoughMemory, MemoryError)):
                batch.give_up()
            for job in jobs:
                try:
                    batch.step(job.sequences)
                except Exception as error:
                    self._fail(job, error)
            if not batch:
                batch.give_up()
        for job in [job for job in jobs if job in self._running]:
            try:
                self._counts["tokens_total"] += job._advance(self)
                if job._is_done():
                    self._finish(job)
            except RankLost:
                raise
            except Exception as error:
                self._fail(job, error)

    def _finish(self, job):
        result = job._result()
        if isinstance(result, Drawn):
            self._counts["pictures_total"] += len(result.pictures)
            self._save(job, result)
        if isinstance(result, Written):
            self._counts["cached_tokens_total"] += result.cached_tokens
        self._average_s += 0.1 * (time.monotonic() - job.since - self._average_s)
        self._forget(job)
        job.tell(Done(result))

    def _save(self, job, result):
        if self.output_dir is None:
            return
        try:
            images, texts = zip(*result.pictures, strict=True)
            save_results(images, self.output_dir, texts)
        except (InputError, OSError) as error:  # the client has its pictures all the same
            log.warning("request %s: its pictures cannot be written (%s)", job.id, type(error).__name__)
        else:
            level = logging.WARNING if job.is_recovered else logging.INFO
            log.log(level, "request %s: its pictures are written", job.id)

    def _fail(self, job, error):
        if job.is_recovered or not isinstance(error, (InputError, Unavailable)):
            self._log_error(f"request {job.id} failed", error)
        self._forget(job)
        job.tell(Failed(error))

    def _forget(self, job, keep_record=False):
        """Take a job out of everything."""
        batch = self._batches.get(job.pipeline)
        for sequence in job.sequences if batch is not None else ():
            batch.leave(sequence)
        with self._changed:
            for jobs in (self._queue, self._running):
                if job in jobs:
                    jobs.remove(job)
        if self.records is not None and not keep_record:
            try:
                self.records.remove(job.id)
            except OSError as error:
                log.warning("request %s: its record stays (%s)", job.id, error.strerror)

    def _recover(self):
        """Draw what an earlier process had accepted."""
        for number, values in self.records.left() if self.records else ():
            try:
                job = Draw(values["pipeline"], values["prompt"], values["n"], values["options"])
                job.id, job.pipeline, job.is_recovered = number, self.pipelines[job.pipeline_name], True
                job.check(job.pipeline)
            except (TypeError, KeyError, AttributeError, InputError):
                log.warning("request %s: refused, its record is damaged or of a model that is not here", number)
                self.records.remove(number)
                continue
            log.warning("request %s: accepted before the restart, it is drawn now", number)
            self._put(job)

    # --- the parts that jobs use

    def _batch(self, pipeline):
        """The batch of a pipeline's model, which is loaded where it is not."""
        from paddlemix.models.emu3.shared_batch import make_batch

        if pipeline not in self._batches:
            self._load(pipeline, pipeline.load)
            name = next(name for name, one in self.pipelines.items() if one is pipeline)
            self._batches[pipeline] = make_batch(pipeline.model, name, prefix_tokens=self.prefix_tokens)
        return self._batches[pipeline]

    def _load(self, pipeline, load):
        """load(); Unavailable where it cannot be. A vision tokenizer that two pipelines have is in memory once."""
        for other in self.pipelines.values():
            if other.vq_model_path == pipeline.vq_model_path and "vision_tokenizer" in vars(other):
                pipeline.vision_tokenizer = other.vision_tokenizer
        try:
            self.with_memory(load)
        except InputError as error:  # its line holds paths of this machine
            if self.state != "loading":
                log.error("a model cannot be loaded: %s", one_line(error))
            raise Unavailable("this model cannot be loaded now; the server's log says why", 60) from error

    def with_memory(self, function, *arguments):
        """function(*arguments); where memory is short, once more without what is only kept to save time."""
        try:
            return function(*arguments)
        except (NotEnoughMemory, MemoryError):
            for batch in self._batches.values():
                batch.give_up()
        return function(*arguments)

    def codes(self, pipeline, image, size=None):
        """The codes of a PIL picture, int64 [h, w], that is brought to a size (height, width) in pixels, or to that of
        the image processor. Those of the last pictures are remembered."""
        processor, image = pipeline.processor, over_white(to_pil(image))[0]
        size = size or processor.image_processor.resized(image.height, image.width)
        key = pipeline.vq_model_path, image.size, size, hashlib.sha256(image.tobytes()).digest()
        if key not in self._codes:
            [self._codes[key]] = self.with_memory(lambda: processor.tokenize_image([image], sizes=[size]))
        self._codes.move_to_end(key)
        codes = self._codes[key]
        while sum(c.size for c in self._codes.values()) > MOST_CODES:
            self._codes.popitem(last=False)
        return codes

    @staticmethod
    def _log_error(what, error):
        """Where it came from, without its message, which may hold what a user wrote."""
        places = "".join(traceback.format_tb(error.__traceback__))
        log.error("%s: %s\n%s", what, type(error).__name__, places)


class Previews:
    """Decoding of previews: a tenth of the time at most, where an idle second was not saved up."""

    def __init__(self):
        self.saved_s, self.then, self.s_per_code = PREVIEW_SAVED_S, time.monotonic(), 0.0

    def may_take(self, codes):
        """Whether a preview of so many codes may be decoded now."""
        needed, now = codes * self.s_per_code, time.monotonic()
        saved = self.saved_s + PREVIEW_SHARE * (now - self.then)
        self.saved_s, self.then = min(saved, max(PREVIEW_SAVED_S, needed)), now
        return self.saved_s >= needed

    @contextmanager
    def measured(self, codes):
        start = time.monotonic()
        yield
        seconds = time.monotonic() - start
        self.saved_s, self.s_per_code = self.saved_s - seconds, seconds / codes


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__
