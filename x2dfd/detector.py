"""The path of one picture: bytes → faces → experts → MLLM → calibration → report. All entry points call `Detector`."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from threading import Lock
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from x2dfd import follow_up, prompts
from x2dfd.calibration import Calibration, logits_of, sigmoid
from x2dfd.degrade import CODEC, codec
from x2dfd.errors import InputError, SetupError, UnknownName
from x2dfd.experts import Expert, Shared, ask
from x2dfd.explain import contradictions, read_cues
from x2dfd.faces import area_polygons
from x2dfd.fetch import BASE_NAME
from x2dfd.files import Json
from x2dfd.intake import FoundFace, OnProgress, Ready, faces_of_report, ready, ready_or_failure
from x2dfd.media import Picture, Source, Video, check_source
from x2dfd.mllm import NOT_FINITE, Encoding, LanguageModel
from x2dfd.model_spec import Mode
from x2dfd.texts import readable, says_all, signs_to_name
from x2dfd.types import MAX_FRAMES, MLLM, Cue, Evidence, Face, FaceReport, Failure, ModelInfo, Report, Verdict
from x2dfd.validation import PROPOSITIONS, Validation

NO_PHOTO = 0.9  # P(a drawing, a painting, a render) from which a face is not assessed: nobody took that photo
CLIP_SHARE, CLIP_LEAST = 0.1, 3  # share of a clip's frames that decide its verdict, and their least number
VIDEO_FRAMES = 32  # spread evenly over a clip, so that three fall into a changed tenth of it

UNCALIBRATED = "p_fake is the language model's own number and not calibrated, so its error rates are not known"


class Detector:
    """MLLM, experts and calibration together. Made by `x2dfd.load`."""

    def __init__(
        self,
        mllm: LanguageModel,
        experts: Sequence[Expert],
        calibration: Calibration | None,
        info: ModelInfo,
        mode: Mode = "calibrated",
        validation: Validation | None = None,
        *,
        question: Callable[[Sequence[Evidence]], str] | None = None,
    ) -> None:
        """`info` lacks the facts about mode, calibration and validation, which are added here. `question` writes a
        face's verdict question from the experts' evidence, by default in the words of training."""
        if mode not in get_args(Mode):
            raise UnknownName("mode", mode, get_args(Mode))
        if mode == "calibrated" and calibration is None:
            raise SetupError(
                "this model has no calibration; use mode='paper', or fit one: x2dfd calibrate",
                code="calibration_missing",
            )
        self.mllm = mllm
        self._last_encoding: tuple[bytes, Encoding] | None = None
        self._encoding_lock = Lock()
        self.experts = list(experts)
        self.calibration = calibration
        self.mode = mode
        self._question = question or (
            lambda evidence: prompts.verdict_question(self.for_prompt(evidence), self.info.score_form)
        )
        applied = self._applied
        info = replace(
            info,
            mode=mode,
            threshold=applied.high if applied else _paper_threshold(calibration),
            band=[applied.low, applied.high] if applied else None,
            weights=applied.weights if applied else None,
            counts_for={k: [n for n, w in fit.weights.items() if w > 0] for k, fit in applied.kinds.items()}
            if applied
            else None,
            calibration_sha256=calibration.sha256 if calibration else None,
        )
        self.validation = validation if validation and validation.fits(info.to_dict()) else None
        self.info = replace(
            info,
            validation=self.validation.summary() if self.validation else None,
            validation_sha256=self.validation.sha256 if self.validation else None,
        )
        self._info_json = self.info.to_dict()

    @property
    def _applied(self) -> Calibration | None:
        """The calibration that verdicts go by; None in paper mode."""
        return self.calibration if self.mode == "calibrated" else None

    # --- entry points ---

    def detect(self, source: Source, *, rationale: bool = True, frames: int = VIDEO_FRAMES) -> Report:
        """Judge one picture, or `frames` evenly spread frames of a video. `source`: a path, its bytes, or a PIL image.

        Raises InputError with a reason code, whatever the file makes a library raise; TypeError for another object.
        """
        [report] = self._judge([ready(source, frames, self.info.crop_size)], rationale)
        assert isinstance(report, Report)
        return report

    def detect_many(
        self,
        sources: Iterable[Source],
        *,
        batch_size: int = 8,
        rationale: bool = True,
        frames: int = VIDEO_FRAMES,
        on_progress: OnProgress | None = None,
    ) -> Iterator[Report | Failure]:
        """Reports in the order of the sources; a file that cannot be judged is a Failure and the run goes on.

        The faces of `batch_size` files go through the models together, while a thread decodes the next batch: `sources`
        is read one batch ahead. `on_progress` gets each frame of a video, in that thread, once its faces are found, and
        each FaceReport once the face is judged. An InputError that it raises ends the work on that file or batch.
        """
        if batch_size < 1 or not 1 <= frames <= MAX_FRAMES:
            raise ValueError(f"batch_size must be at least 1, and frames from 1 to {MAX_FRAMES}")
        if isinstance(sources, Source):
            raise TypeError("detect_many takes a list of files, or another iterable of them; for one file, call detect")
        source = map(check_source, sources)
        prepare = partial(ready_or_failure, frames=frames, side=self.info.crop_size, on_progress=on_progress)
        decoder = ThreadPoolExecutor(1, "x2dfd-decode")
        try:
            # One task a file, so that a run that is broken off waits for one file and not for a batch.
            futures = [decoder.submit(prepare, s) for s in islice(source, batch_size)]
            source_error: Exception | None = None
            while futures:
                batch = [future.result() for future in futures]
                futures = []
                try:
                    futures = [decoder.submit(prepare, s) for s in islice(source, batch_size)]
                except Exception as error:  # from the caller's iterator: raised after this batch's reports
                    source_error = error
                yield from self._batch(batch, rationale, on_progress)
            if source_error is not None:
                raise source_error
        finally:
            decoder.shutdown(cancel_futures=True)

    def chat(self, report: Report, question: str, *, source: Source | None = None) -> str:
        """Answer a follow-up about a report. The stored verdict stands, whatever is asked.

        Where the report's facts do not answer it, the model looks again at `source`, by default the report's path.
        Sentences against the verdict are left out, except in paper mode. Raises InputError for another picture or none.
        """
        decider = report.decider
        if (stored_answer := follow_up.from_report(report, decider, question)) is not None or decider is None:
            return stored_answer or follow_up.NO_FACE
        source = report.path if source is None else source
        if source is None:
            raise InputError("no_picture", "a follow-up needs the picture that the report is about")
        face = faces_of_report(report, source, self.info.crop_size)[decider.index].face
        [verdict_question] = self._questions([decider.evidence])
        answer = f"{prompts.rationale_start(decider.verdict.side)} {decider.rationale}".strip()
        with self._encoded(through_codec([face])[0].view[None]) as encoding:
            reply = self.mllm.write(encoding, [verdict_question], [""], turns=[(answer, question)])[0]
        return reply if self.mode == "paper" else follow_up.checked(reply, decider)

    def explain(self, report: Report, source: Source, *, on_text: Callable[[str], None] | None = None) -> Report:
        """The same report with its rationales, cues and contradictions; verdicts and scores stay as they are.

        `source` is the file that the report is about. `on_text` gets the text so far of the face that decided, token
        by token. Raises InputError when it is another file.
        """
        start = time.perf_counter()
        found_faces = faces_of_report(report, source, self.info.crop_size)
        order = sorted(report.faces, key=FaceReport.suspicion, reverse=True)  # the text of the first is streamed
        explained: dict[int, FaceReport] = {}
        for i in range(0, len(order), self.mllm.batch):
            batch = order[i : i + self.mllm.batch]
            texts = dict.fromkeys((f.index for f in batch), "")
            if selected := [f for f in batch if self._gets_rationale(f.verdict, f.evidence)]:
                streamed = selected[0] is batch[0] and batch[0].verdict.label == "fake"  # other texts are mended
                crops = np.stack([f.view for f in through_codec([found_faces[f.index].face for f in selected])])
                with self._encoded(crops) as encoding:
                    judged = [(f.verdict, f.evidence) for f in selected]
                    rationales = self._write(encoding, judged, on_text if i == 0 and streamed else None)
                texts |= zip((f.index for f in selected), rationales, strict=True)
            explained |= {f.index: self._with_rationale(f, found_faces[f.index].face, texts[f.index]) for f in batch}
        decider = explained[order[0].index] if order else None
        return replace(
            report,
            faces=tuple(explained[f.index] for f in report.faces),
            rationale=decider.rationale if decider else "",
            cues=decider.cues if decider else (),
            timings=report.timings | {"rationale": round(time.perf_counter() - start, 4)},
        )

    def judge_faces(self, faces: Sequence[Face]) -> tuple[NDArray[np.float64], list[list[Evidence]]]:
        """The inputs of a verdict: the MLLM's logits [n], and each face's expert evidence."""
        faces = through_codec(faces)
        with self._encoded(np.stack([f.view for f in faces])) as encoding:
            evidence = self.evidence(faces, encoding)
            return self._mllm_logits(encoding, self._questions(evidence)), evidence

    # --- the pipeline ---

    @contextlib.contextmanager
    def _encoded(self, crops: NDArray[np.uint8]) -> Iterator[Encoding]:
        """The encoding of crops [n, s, s, 3], for the `with` block alone: every question writes into its cache.

        The last encoding of a single face is kept for explanation and follow-ups; one of many faces takes gigabytes.
        """
        key = hashlib.sha256(np.ascontiguousarray(crops).data).digest()
        with self._encoding_lock:  # taken out, so that no two threads have it
            last, self._last_encoding = self._last_encoding, None
        encoding = last[1] if last is not None and last[0] == key else None
        del last
        if encoding is None:
            encoding = self.mllm.encode(crops)
        yield encoding
        if len(crops) == 1:  # not reached after an error, which may leave it half written
            with self._encoding_lock:
                self._last_encoding = (key, encoding)

    def _batch(self, batch: Sequence[Ready], rationale: bool, on_progress: OnProgress | None) -> list[Report | Failure]:
        try:
            return self._judge(batch, rationale, on_progress)
        except InputError as error:  # a served model refuses one of these files
            if len(batch) > 1:
                return [result for file in batch for result in self._batch([file], rationale, on_progress)]
            media = batch[0].media
            return [Failure(media.path, media.sha256, error.code, error.reason)]

    def _judge(
        self, batch: Sequence[Ready], rationale: bool, on_progress: OnProgress | None = None
    ) -> list[Report | Failure]:
        stages = {stage: sum(file.seconds.get(stage, 0.0) for file in batch) for stage in ("decode", "faces")}
        clock = _Clock({"files": len(batch), **stages})
        faces = iter(self._face_reports([f for file in batch for f in file.faces], rationale, clock, on_progress))
        return [
            file.media
            if isinstance(file.media, Failure)
            else self._report(file.media, file.summary, [*islice(faces, len(file.faces))], file.notes, clock.seconds)
            for file in batch
        ]

    def _face_reports(
        self, found_faces: Sequence[FoundFace], rationale: bool, clock: _Clock, on_progress: OnProgress | None
    ) -> list[FaceReport]:
        """All faces of a batch through tower, experts, MLLM and calibration."""
        reports: list[FaceReport] = []
        for start in range(0, len(found_faces), self.mllm.batch):
            batch = found_faces[start : start + self.mllm.batch]
            faces = through_codec([found.face for found in batch])
            with self._encoded(np.stack([f.view for f in faces])) as encoding:
                clock.lap("look")
                evidence = self.evidence(faces, encoding)
                clock.lap("experts")
                questions = self._questions(evidence)
                logits: list[float | None] = [None] * len(batch)
                # Where its number has no weight, the MLLM is asked for rationales alone.
                if self._applied is None or self._applied.counts(MLLM):
                    logits = [float(v) for v in self._mllm_logits(encoding, questions)]
                    clock.lap("verdict")
                verdicts = [self._verdict(logit, row) for logit, row in zip(logits, evidence, strict=True)]
                texts = dict.fromkeys(range(len(batch)), "")
                judged = list(zip(verdicts, evidence, strict=True))
                if selected := [k for k, face in enumerate(judged) if rationale and self._gets_rationale(*face)]:
                    subset = encoding if len(selected) == len(batch) else encoding.part(selected)
                    texts |= zip(selected, self._write(subset, [judged[k] for k in selected]), strict=True)
                    clock.lap("rationale")
            for k, (found, logit, row, verdict) in enumerate(zip(batch, logits, evidence, verdicts, strict=True)):
                report = FaceReport(
                    index=found.face.index,
                    box=found.face.box,
                    confidence=found.face.confidence,
                    verdict=verdict,
                    p_fake_mllm=None if logit is None else float(sigmoid(logit)),
                    rationale="",
                    cues=(),
                    evidence=tuple(row),
                    crop=_crop_corners(found.face),
                    frame=found.frame,
                    time_s=found.time_s,
                )
                reports.append(self._with_rationale(report, found.face, texts[k]) if rationale else report)
                if on_progress:
                    on_progress(reports[-1])
        return reports

    def _gets_rationale(self, verdict: Verdict, evidence: Sequence[Evidence]) -> bool:
        """Whether the MLLM writes a face's text. In calibrated mode it writes none for a face that is not called fake,
        nor one of which nothing would stay."""
        if self._applied is None:
            return True
        if verdict.label != "fake":
            return False
        return not self._pointed_only or bool(signs_to_name(verdict, self._counted(evidence)))

    def _write(
        self,
        encoding: Encoding,
        faces: Sequence[tuple[Verdict, Sequence[Evidence]]],
        on_text: Callable[[str], None] | None = None,
    ) -> list[str]:
        """The MLLM's text about each encoded face, which it may stop where the rest would be left out."""
        starts = [prompts.rationale_start(verdict.side) for verdict, _ in faces]
        enough: list[Callable[[str], bool]] = []
        if self._pointed_only:
            enough = [partial(says_all, verdict=v, signs=signs_to_name(v, self._counted(e))) for v, e in faces]
        return self.mllm.write(
            encoding, self._questions([evidence for _, evidence in faces]), starts, on_text=on_text, enough=enough
        )

    @property
    def _pointed_only(self) -> bool:
        """Whether a text may only name signs that an expert points at: the small model sees no more (LOG.md)."""
        if self._applied is None or not self._embedded:
            return False
        counted = (e.card for e in self.experts if self._applied.counts(e.card.name))
        return any(" " in covered for card in counted for covered in card.covers)

    def _counted(self, evidence: Sequence[Evidence]) -> list[Evidence]:
        """The evidence of experts that have a weight in the verdict."""
        return [e for e in evidence if self._applied is None or self._applied.counts(e.expert)]

    def _with_rationale(self, report: FaceReport, face: Face, text: str) -> FaceReport:
        """The report with its rationale as people read it, and the cues, areas and contradictions in it.

        In paper mode the text stays as the model wrote it.
        """
        verdict = report.verdict
        if self._applied:
            text = readable(text, verdict, self._counted(report.evidence), pointed_only=self._pointed_only)
        cues = read_cues(text)
        conflicts = contradictions(text, verdict.label, self._under_prompt_names(report.evidence), cues, verdict.kind)
        return replace(report, rationale=text, cues=cues, contradictions=conflicts, areas=_areas(face, cues))

    def evidence(self, faces: Sequence[Face], encoding: Encoding) -> list[list[Evidence]]:
        """Each expert's evidence on each face: [face][expert]. Experts reuse the embedded model's tower states."""
        return evidence_of(self.experts, faces, encoding.shared if self._embedded else None)

    @property
    def _embedded(self) -> bool:
        return self.info.base["name"] == BASE_NAME

    def for_prompt(self, evidence: Sequence[Evidence]) -> list[Evidence]:
        """The evidence of the experts that the adapter was trained with, under the names that the prompt uses.

        Evidence of experts that joined at calibration is left out.
        """
        return self._under_prompt_names([e for e in evidence if e.expert in self.info.in_prompt])

    def _under_prompt_names(self, evidence: Sequence[Evidence]) -> list[Evidence]:
        aliases = self.info.aliases or {}
        return [replace(e, expert=aliases.get(e.expert, e.expert)) for e in evidence]

    def _questions(self, evidence: Sequence[Sequence[Evidence]]) -> list[str]:
        return [self._question(row) for row in evidence]

    def _mllm_logits(self, encoding: Encoding, questions: Sequence[str]) -> NDArray[np.float64]:
        """Logit of fake against real: [n]. Raises InputError when one is not finite."""
        logits = self.mllm.verdict_logits(encoding, questions)
        if not np.isfinite(logits).all():
            raise InputError("no_score", NOT_FINITE)
        return logits

    def _verdict(self, mllm_logit: float | None, evidence: Sequence[Evidence]) -> Verdict:
        applied = self._applied
        deciding = self._counted(evidence)
        if any(e.no_photo is not None and e.no_photo >= NO_PHOTO for e in deciding):
            return Verdict("inconclusive", None, "not_a_photograph")
        if applied is None:
            return self._called(float(sigmoid(mllm_logit or 0.0)), None)
        covers = {e.card.name: e.card.covers for e in self.experts}
        return self._called(applied.probability(logits_of(mllm_logit, evidence, covers)), _likelier_kind(deciding))

    def _called(self, p: float, kind: str | None) -> Verdict:
        """The verdict of an estimate, by the rule of the mode."""
        if self._applied:
            return self._applied.verdict(p, kind)
        return Verdict("fake" if p >= _paper_threshold(self.calibration) else "real", p)

    def _report(
        self,
        media: Picture | Video,
        summary: Json,
        faces: Sequence[FaceReport],
        warnings: Sequence[str],
        timings: dict[str, float],
    ) -> Report:
        verdict, decider = self._overall(media, faces)
        return Report(
            path=media.path,
            sha256=media.sha256,
            media=summary,
            verdict=verdict,
            faces=tuple(faces),
            rationale=decider.rationale if decider else "",
            cues=decider.cues if decider else (),
            evidence=decider.evidence if decider else (),
            provenance=media.provenance,
            model=self._info_json,
            versions=versions(),
            timings={k: round(v, 4) for k, v in timings.items()},
            warnings=(*warnings, *(self._remarks() if verdict.p_fake is not None else ())),
            likelihood_ratio=self._likelihood_ratio(media, verdict),
        )

    def _remarks(self) -> Iterator[str]:
        """What a reader must know of every probability that this model gives."""
        if (applied := self._applied) is None:
            yield UNCALIBRATED
            return
        if few := applied.few_pictures:
            yield f"the calibration was {few}"
        if missing := applied.missing([e.card.name for e in self.experts]):
            names = ", ".join(missing)
            yield f"the calibration was fitted with {names} too, left out here: its error rates do not hold"

    def _likelihood_ratio(self, media: Picture | Video, verdict: Verdict) -> Json:
        """The likelihood ratio of the picture's p_fake in the validation run; `value` is None where there is none."""
        if verdict.p_fake is None:
            return {"value": None, "reason": "nothing was assessed"}
        if self.validation is None:
            return {"value": None, "reason": "no validation run of this model, in this mode, is at hand"}
        if isinstance(media, Video):
            return {"value": None, "reason": "the validation run holds pictures, not videos"}
        ratio = self.validation.likelihood_ratio(verdict.p_fake)
        return ratio | {"run": self.validation.run, "propositions": list(PROPOSITIONS)}

    def _overall(self, media: Picture | Video, faces: Sequence[FaceReport]) -> tuple[Verdict, FaceReport | None]:
        """Picture: the most suspicious face. Video: the mean of the most suspicious tenth of the frames, each judged by
        its most suspicious face, so that a forged stretch is found in a clip that is mostly real."""
        if not faces:
            return Verdict("inconclusive", None, "no_face"), None
        decider = max(faces, key=FaceReport.suspicion)
        if isinstance(media, Picture) or decider.verdict.p_fake is None:  # None: nothing was assessed, as in drawings
            return decider.verdict, decider
        frames: dict[int | None, float] = {}
        for face in faces:
            if face.verdict.p_fake is not None:
                frames[face.frame] = max(frames.get(face.frame, 0.0), face.verdict.p_fake)
        worst = sorted(frames.values(), reverse=True)
        p = float(np.mean(worst[: max(CLIP_LEAST, int(CLIP_SHARE * len(worst)))]))
        return self._called(p, decider.verdict.kind), decider


def evidence_of(experts: Sequence[Expert], faces: Sequence[Face], shared: Shared | None = None) -> list[list[Evidence]]:
    """Each expert's evidence on each face: [face][expert], without another pass of the crops through the codec."""
    columns = [ask(expert, faces, shared) for expert in experts]
    return [list(row) for row in zip(*columns, strict=True)] if columns else [[] for _ in faces]


def _likelier_kind(evidence: Sequence[Evidence]) -> str | None:
    """The likelier kind of fake, according to the first expert that tells the kinds apart."""
    kinds = next((e.kinds for e in evidence if e.kinds), None)
    return max(kinds, key=lambda kind: kinds[kind]) if kinds else None


class _Clock:
    """Seconds per stage, added up."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def _areas(face: Face, cues: Sequence[Cue]) -> dict[str, list[list[list[float]]]]:
    """Polygons, in picture pixels, of the areas that the cues name."""
    polygons = area_polygons(face.landmarks)
    areas = {c.area for c in cues} & set(polygons)
    return {a: [[[round(float(x), 1), round(float(y), 1)] for x, y in q] for q in polygons[a]] for a in sorted(areas)}


def through_codec(faces: Sequence[Face]) -> list[Face]:
    """The faces with their crops as every model sees them."""
    larger = [None if f.large is None else codec(f.large, *CODEC) for f in faces]
    return [replace(f, crop=codec(f.crop, *CODEC), large=large) for f, large in zip(faces, larger, strict=True)]


def _crop_corners(face: Face) -> tuple[tuple[float, float], ...]:
    """Top left, top right and bottom left corner of the aligned crop, in picture pixels."""
    size = float(face.crop.shape[0])
    points = np.concatenate([face.crop_landmarks, np.ones((len(face.crop_landmarks), 1))], 1)
    affine, *_ = np.linalg.lstsq(points, face.landmarks, rcond=None)  # [3, 2]: crop pixels to picture pixels
    corners = np.array([[0.0, 0.0, 1.0], [size, 0.0, 1.0], [0.0, size, 1.0]]) @ affine
    return tuple((round(float(x), 1), round(float(y), 1)) for x, y in corners)


def _paper_threshold(calibration: Calibration | None) -> float:
    return calibration.mllm_threshold if calibration else 0.5


@cache
def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that a score depends on."""
    numbers = {"python": platform.python_version()}
    for name in ("x2dfd", "torch", "transformers", "peft", "ai-edge-litert", "opencv-python-headless", "pillow"):
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            numbers[name] = "not installed"
    return numbers
