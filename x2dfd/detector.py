"""The road of one picture: bytes → faces → experts → MLLM → calibration → report. Every door calls the `Detector`."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from x2dfd import follow_up, prompts
from x2dfd.adapter import (
    EMBEDDED,
    WHOLE,
    AdapterCard,
    add_tower,
    attach,
    check_adapter,
    check_contents,
    check_probes,
    expert_hashes,
    probe_logits,
    read_adapter_card,
)
from x2dfd.calibration import MLLM, Calibration, parts_of
from x2dfd.degrade import CODEC, codec
from x2dfd.errors import InputError, SetupError, UnknownName, one_file
from x2dfd.experts import DEFAULT, Expert, Shared, ask, load_expert
from x2dfd.explain import contradictions, read_cues
from x2dfd.faces import area_polygons, find_faces, find_turned_faces
from x2dfd.fetch import BASE_NAME
from x2dfd.loading import TORCH_DTYPES, Bits, base_identity, checkpoint_dtype, choose_device, load_model, reading
from x2dfd.media import Frame, Picture, Video, load_media, media_summary
from x2dfd.mllm import NOT_FINITE, LocalMLLM, YesNo
from x2dfd.provenance import read_provenance
from x2dfd.texts import readable
from x2dfd.types import Evidence, Face, FaceReport, Failure, Report, Verdict, frames_asked
from x2dfd.validation import PROPOSITIONS, Validation

Mode = Literal["calibrated", "paper"]
Source = str | Path | bytes | Image

NO_PHOTO = 0.9  # P(a drawing, a painting, a render) from which a face is not assessed: nobody took that photo
CLIP_SHARE, CLIP_LEAST = 0.1, 3  # a clip is judged by this share of its frames, and by so many of them at least
VIDEO_FRAMES = 32  # of a clip, spread evenly: a tenth of it that was changed holds three of them
FRAME_FACES = 4  # of one frame of a video
TURN_EVERY = 4  # frames: of a clip without a face so far, these are also looked at on their side and on their head
MAX_FACES = 24  # in one picture; the smaller ones are left out with a warning


UNCALIBRATED = (
    "p_fake is the language model's own number: no calibration was fitted for this model, so its errors are not known"
)


class LanguageModel(Protocol):
    """What a Detector asks of an MLLM, local (x2dfd.mllm) or served (x2dfd.served)."""

    name: str
    batch: int  # faces that go through it together

    def look(self, crops: NDArray[np.uint8]) -> Any: ...  # [n, h, w, 3]; has `tower_states`, or None for them
    def verdict_logits(self, look: Any, questions: Sequence[str]) -> NDArray[np.float64]: ...
    def write(
        self,
        look: Any,
        questions: Sequence[str],
        starts: Sequence[str],
        *,
        turns: Sequence[tuple[str, str]] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> list[str]: ...
    def yes_no(self, crop: NDArray[np.uint8], questions: Sequence[str], /) -> YesNo: ...


@dataclass(frozen=True, eq=False)
class _Seen:
    """A face with where it was found."""

    face: Face
    frame: int | None
    time_s: float | None


@dataclass(frozen=True, eq=False)
class _Ready:
    """A file as the models take it: decoded, its faces found, and its pixels let go."""

    media: Picture | Video | Failure
    summary: dict[str, Any]  # Report.media
    seen: list[_Seen]
    notes: list[str]
    seconds: dict[str, float]


class Detector:
    """MLLM, experts and calibration together. Made by `x2dfd.load`."""

    def __init__(
        self,
        mllm: LanguageModel,
        experts: Sequence[Expert],
        calibration: Calibration | None,
        facts: dict[str, Any],
        mode: Mode = "calibrated",
        validation: Validation | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise UnknownName("mode", mode, get_args(Mode))
        if mode == "calibrated" and calibration is None:
            raise SetupError("this model has no calibration; use mode='paper', or fit one: x2dfd calibrate")
        self.mllm = mllm
        self._kept: tuple[bytes, Any] | None = None
        self._keeping = Lock()
        self.experts = list(experts)
        self.calibration = calibration
        self.mode = mode
        self.facts = {
            **facts,
            "mode": mode,
            "threshold": calibration.high if calibration and mode == "calibrated" else _paper_threshold(calibration),
            "band": [calibration.low, calibration.high] if calibration and mode == "calibrated" else None,
            "weights": calibration.weights if calibration and mode == "calibrated" else None,
            "calibration_sha256": calibration.sha256 if calibration else None,
        }
        self.validation = validation if validation and validation.fits(self.facts) else None
        self.facts["validation"] = self.validation.summary() if self.validation else None
        self.facts["validation_sha256"] = self.validation.sha256 if self.validation else None

    @property
    def _asks_mllm(self) -> bool:
        """Whether a verdict needs the MLLM's own number; else it is asked for rationales alone."""
        return self.mode == "paper" or self.calibration is None or self.calibration.weights.get(MLLM, 0.0) > 0

    # --- doors ---

    def detect(self, source: Source, *, rationale: bool = True, frames: int = VIDEO_FRAMES) -> Report:
        """Judge one picture or video (a path, its bytes, or a PIL image); of a video, `frames` spread evenly over it.

        Raises InputError with a reason code, whatever the file makes a library raise.
        """
        [report] = self._judge([_ready(source, frames)], rationale)
        assert isinstance(report, Report)
        return report

    def detect_many(
        self, sources: Iterable[Source], *, batch_size: int = 8, rationale: bool = True, frames: int = VIDEO_FRAMES
    ) -> Iterator[Report | Failure]:
        """Reports in the order of the sources; a file that cannot be judged is a Failure and the run goes on.

        The faces of `batch_size` files go through the models together. Meanwhile a thread decodes the next batch and
        finds its faces, so `sources` is read one batch ahead (in the caller's thread); two batches stand in memory.
        """
        if batch_size < 1 or frames < 1:
            raise ValueError("batch_size and frames must be at least 1")
        source = iter(sources)
        beside = ThreadPoolExecutor(1, "x2dfd-decode")
        try:
            # A file each, so that a run that is broken off waits for one file and not for a batch.
            ahead = [beside.submit(_ready_or_failure, s, frames) for s in islice(source, batch_size)]
            broken: Exception | None = None
            while ahead:
                batch = [one.result() for one in ahead]
                ahead = []
                try:
                    ahead = [beside.submit(_ready_or_failure, s, frames) for s in islice(source, batch_size)]
                except Exception as error:  # of the caller's iterator: raised in its turn, after this batch's reports
                    broken = error
                yield from self._batch(batch, rationale)
            if broken is not None:
                raise broken
        finally:
            beside.shutdown(cancel_futures=True)

    def chat(self, report: Report, question: str, *, source: Source | None = None) -> str:
        """Answer a follow-up about a report. The stored verdict stands, whatever is asked.

        What the report's facts answer is answered from them. Else the model looks at the picture again: `source`, by
        default the file of the report's path; what it says against the verdict is left out, but in the paper's mode.
        Raises InputError when there is no such picture, or when it is another one.
        """
        deciding = report.decider
        if (known := follow_up.from_report(report, deciding, question)) is not None or deciding is None:
            return known or follow_up.NO_FACE
        source = report.path if source is None else source
        if source is None:
            raise InputError("no_picture", "a follow-up needs the picture that the report is about")
        face = _found_again(report, source)[deciding.index].face
        [asked] = self._questions([deciding.evidence])
        answer = f"{prompts.rationale_start(deciding.verdict.side)} {deciding.rationale}".strip()
        with self._look(through_codec([face])[0].crop[None]) as look:
            said = self.mllm.write(look, [asked], [""], turns=[(answer, question)])[0]
        return said if self.mode == "paper" else follow_up.checked(said, deciding)

    def explain(self, report: Report, source: Source, *, on_text: Callable[[str], None] | None = None) -> Report:
        """The same report with its rationales, cues and contradictions; verdicts and scores stay as they are.

        `source` is the file that the report is about. `on_text` is told the text so far of the face that decided, token
        by token. Raises InputError when it is another file.
        """
        start = time.perf_counter()
        found = _found_again(report, source)
        order = sorted(report.faces, key=FaceReport.suspicion, reverse=True)  # the text of the first is streamed
        told: dict[int, FaceReport] = {}
        for at in range(0, len(order), self.mllm.batch):
            part = order[at : at + self.mllm.batch]
            faces = through_codec([found[f.index].face for f in part])
            with self._look(np.stack([f.crop for f in faces])) as look:
                texts = self.mllm.write(
                    look,
                    self._questions([f.evidence for f in part]),
                    [prompts.rationale_start(f.verdict.side) for f in part],
                    on_text=on_text if at == 0 and part[0].verdict.label == "fake" else None,  # others are mended much
                )
            told |= {
                f.index: self._explained(f, found[f.index].face, text) for f, text in zip(part, texts, strict=True)
            }
        deciding = told[order[0].index] if order else None
        return replace(
            report,
            faces=tuple(told[f.index] for f in report.faces),
            rationale=deciding.rationale if deciding else "",
            cues=deciding.cues if deciding else (),
            timings=report.timings | {"rationale": round(time.perf_counter() - start, 4)},
        )

    def judge_faces(self, faces: Sequence[Face]) -> tuple[NDArray[np.float64], list[list[Evidence]]]:
        """The parts of a verdict before they are joined: the MLLM's logits [n], and each face's expert evidence."""
        faces = through_codec(faces)
        with self._look(np.stack([f.crop for f in faces])) as look:
            evidence = self.evidence(faces, look)
            return self._mllm_logits(look, self._questions(evidence)), evidence

    # --- the road ---

    @contextlib.contextmanager
    def _look(self, crops: NDArray[np.uint8]) -> Iterator[Any]:
        """The MLLM's look at crops [n, s, s, 3], for the `with` block alone: what is asked of it writes into its cache.

        The last look at a single face is kept: verdict, explanation and follow-ups are mostly about the same one, and
        share its encoding. A look at many would keep gigabytes of a large model's cache.
        """
        key = hashlib.sha256(np.ascontiguousarray(crops).data).digest()
        with self._keeping:  # taken out, so that no two threads have it
            kept, self._kept = self._kept, None
        look = kept[1] if kept is not None and kept[0] == key else None
        del kept
        if look is None:
            look = self.mllm.look(crops)
        yield look
        if len(crops) == 1:  # not where an error left it half written: then this line is not reached
            with self._keeping:
                self._kept = (key, look)

    def _batch(self, batch: Sequence[_Ready], rationale: bool) -> list[Report | Failure]:
        try:
            return self._judge(batch, rationale)
        except InputError as error:  # of a served model, about one of these files
            if len(batch) > 1:
                return [result for one in batch for result in self._batch([one], rationale)]
            media = batch[0].media
            return [Failure(media.path, media.sha256, error.code, error.reason)]

    def _judge(self, batch: Sequence[_Ready], rationale: bool) -> list[Report | Failure]:
        stages = {stage: sum(one.seconds.get(stage, 0.0) for one in batch) for stage in ("decode", "faces")}
        clock = _Clock({"files": len(batch), **stages})
        faces = iter(self._face_reports([s for one in batch for s in one.seen], rationale, clock))
        results: list[Report | Failure] = []
        for one in batch:
            if isinstance(one.media, Failure):
                results.append(one.media)
                continue
            own = list(islice(faces, len(one.seen)))
            results.append(self._report(one.media, one.summary, own, one.notes, clock.seconds))
        return results

    def _face_reports(self, seen: Sequence[_Seen], rationale: bool, clock: _Clock) -> list[FaceReport]:
        """All faces of a batch through tower, experts, MLLM and calibration."""
        out: list[FaceReport] = []
        for start in range(0, len(seen), self.mllm.batch):
            part = seen[start : start + self.mllm.batch]
            faces = through_codec([s.face for s in part])
            with self._look(np.stack([f.crop for f in faces])) as look:
                clock.lap("look")
                evidence = self.evidence(faces, look)
                clock.lap("experts")
                questions = self._questions(evidence)
                logits: list[float | None] = [None] * len(part)
                if rationale or self._asks_mllm:
                    logits = [float(v) for v in self._mllm_logits(look, questions)]
                    clock.lap("verdict")
                verdicts, texts = [], [""] * len(part)
                for own, said in zip(logits, evidence, strict=True):
                    verdicts.append(self._verdict(own, said))
                if rationale:
                    starts = [prompts.rationale_start(v.side) for v in verdicts]
                    texts = self.mllm.write(look, questions, starts)
                    clock.lap("rationale")
            for s, own, said, verdict, text in zip(part, logits, evidence, verdicts, texts, strict=True):
                judged = FaceReport(
                    index=s.face.index,
                    box=s.face.box,
                    confidence=s.face.confidence,
                    verdict=verdict,
                    p_fake_mllm=None if own is None else float(1 / (1 + np.exp(-own))),
                    rationale="",
                    cues=(),
                    evidence=tuple(said),
                    crop=_corners(s.face),
                    frame=s.frame,
                    time_s=s.time_s,
                )
                out.append(self._explained(judged, s.face, text) if text else judged)
        return out

    def _explained(self, judged: FaceReport, face: Face, text: str) -> FaceReport:
        """With the rationale as people read it, the cues that it names, where they lie, and what it contradicts.

        In the paper's mode the text stays as the model wrote it.
        """
        verdict = judged.verdict
        if self.mode == "calibrated" and self.calibration:
            uncounted = frozenset(name for name, weight in self.calibration.weights.items() if weight == 0)
            text = readable(text, verdict, judged.evidence, uncounted)
        cues = read_cues(text)
        against = contradictions(text, verdict.label, judged.evidence, cues, verdict.kind)
        return replace(judged, rationale=text, cues=cues, contradictions=against, areas=_areas(face, cues))

    def evidence(self, faces: Sequence[Face], look: Any) -> list[list[Evidence]]:
        """What each expert says of each face: [face][expert]. The embedded model's pass of the tower serves them."""
        ours = self.facts["base"]["name"] == BASE_NAME
        return evidence_of(self.experts, faces, Shared(look.tower_states, look.tower or "") if ours else None)

    def _questions(self, evidence: Sequence[Sequence[Evidence]]) -> list[str]:
        """Each face's question, with what the experts that the adapter was trained with say of it.

        Of the others, which joined at calibration, the MLLM knows nothing.
        """
        known, form = self.facts["in_prompt"], self.facts["score_form"]
        return [prompts.verdict_question([e for e in said if e.expert in known], form) for said in evidence]

    def _mllm_logits(self, look: Any, questions: Sequence[str]) -> NDArray[np.float64]:
        """Logit of fake against real: [n]. Raises InputError when one is not finite: that is no verdict."""
        logits = self.mllm.verdict_logits(look, questions)
        if not np.isfinite(logits).all():
            raise InputError("no_score", NOT_FINITE)
        return logits

    def _verdict(self, mllm_logit: float | None, evidence: Sequence[Evidence]) -> Verdict:
        if any(e.no_photo is not None and e.no_photo >= NO_PHOTO for e in evidence):
            return Verdict("inconclusive", None, "not_a_photograph")
        if self.mode == "paper" or self.calibration is None:
            p = float(1 / (1 + np.exp(-(mllm_logit or 0.0))))
            return Verdict("fake" if p >= self.facts["threshold"] else "real", p)
        covers = {e.card.name: e.card.covers for e in self.experts}
        parts = parts_of(mllm_logit, evidence, covers)
        return self.calibration.verdict(self.calibration.probability(parts), _kind(evidence))

    def _report(
        self,
        media: Picture | Video,
        summary: dict[str, Any],
        faces: Sequence[FaceReport],
        warnings: Sequence[str],
        timings: dict[str, float],
    ) -> Report:
        verdict, deciding = self._overall(media, faces)
        return Report(
            path=media.path,
            sha256=media.sha256,
            media=summary,
            verdict=verdict,
            faces=tuple(faces),
            rationale=deciding.rationale if deciding else "",
            cues=deciding.cues if deciding else (),
            evidence=deciding.evidence if deciding else (),
            provenance=media.provenance,
            model=self.facts,
            versions=versions(),
            timings={k: round(v, 4) for k, v in timings.items()},
            warnings=(*warnings, *([] if self.calibration or not faces else [UNCALIBRATED])),
            likelihood_ratio=self._likelihood_ratio(media, verdict),
        )

    def _likelihood_ratio(self, media: Picture | Video, verdict: Verdict) -> dict[str, Any]:
        """What the picture's p_fake weighs by the validation run; `value` is None where no run supports a number."""
        reason = None
        if verdict.p_fake is None:
            reason = "nothing was assessed"
        elif self.validation is None:
            reason = "no validation run of this model, in this mode, is at hand"
        elif isinstance(media, Video):
            reason = "the validation run holds pictures, not videos"
        if reason or verdict.p_fake is None or self.validation is None:
            return {"value": None, "reason": reason}
        found = self.validation.likelihood_ratio(verdict.p_fake)
        return found | {"run": self.validation.run, "propositions": list(PROPOSITIONS)}

    def _overall(self, media: Picture | Video, faces: Sequence[FaceReport]) -> tuple[Verdict, FaceReport | None]:
        """Picture: the most suspicious face. Video: the mean of the most suspicious tenth of the frames, each judged by
        its most suspicious face, so that a forged stretch is found in a clip that is mostly real."""
        if not faces:
            return Verdict("inconclusive", None, "no_face"), None
        deciding = max(faces, key=FaceReport.suspicion)
        if isinstance(media, Picture):
            return deciding.verdict, deciding
        if deciding.verdict.p_fake is None:  # nothing in it was assessed: drawings
            return deciding.verdict, deciding
        frames: dict[int | None, float] = {}
        for face in faces:
            if face.verdict.p_fake is not None:
                frames[face.frame] = max(frames.get(face.frame, 0.0), face.verdict.p_fake)
        worst = sorted(frames.values(), reverse=True)
        p = float(np.mean(worst[: max(CLIP_LEAST, int(CLIP_SHARE * len(worst)))]))
        if self.mode == "paper" or self.calibration is None:
            return Verdict("fake" if p >= self.facts["threshold"] else "real", p), deciding
        return self.calibration.verdict(p, deciding.verdict.kind), deciding


def load(
    model: str | Path | None = None,
    *,
    base: str | None = None,
    adapter: str | Path | None = None,
    served: str | None = None,
    mode: Mode | None = None,
    threads: int | None = None,
    experts: Sequence[str] | None = None,
    other_experts: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    device_map: str | None = None,
    bits: Bits | None = None,
) -> Detector:
    """A detector that is ready to use.

    `model`: None for the embedded model, or an adapter directory. `base` (a LLaVA directory or hub name) with `adapter`
    (or without: the bare model, mode="paper") for any other. `served`: the address of an OpenAI-compatible endpoint,
    `model` is then a name there, and `adapter` the directory that it serves under that name, which brings experts and
    calibration. `mode`: calibrated, but paper for a served model without an adapter. `experts`: some of those that the
    adapter was trained or calibrated with, or, with mode="paper", any; `other_experts`: also other weights than those,
    as calibration does. `device` and `dtype` of a local MLLM (cpu, cuda, cuda:1 ...; fp32, bf16, fp16): by default a
    CUDA device with bf16 where there is one, else the CPU, with fp32 but for a base in 16 bits; experts stay on the
    CPU. `device_map`: spreads a large model over devices, as in transformers ("auto"); `bits`: reads its weights in 4
    or 8 bits (bitsandbytes).
    Raises SetupError with what mends it.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if served is not None:
        if device or dtype or device_map or bits:
            raise SetupError("a served model computes where its server runs: give no device, dtype, map and bits")
        return _load_served(served, model, base, adapter, mode, experts)
    mode = mode or "calibrated"
    if model and adapter:
        raise SetupError("give an adapter directory once: as `model`, or as `adapter` beside `base`")
    if base is not None and not adapter and not model and mode == "calibrated":
        raise SetupError("a bare model has no calibration: give its adapter directory too, or take mode='paper'")
    folder = Path(model or adapter or EMBEDDED) if (model or adapter or base is None) else None
    if base == BASE_NAME:  # the embedded base by its name: bare, where no adapter is given
        base = None
    card = read_adapter_card(folder) if folder else None
    if folder and card and card.weights == WHOLE:
        base = str(folder / WHOLE)
    place, precision = choose_device(device, dtype, base)
    with ThreadPoolExecutor(1) as beside:
        hashed = beside.submit(base_identity, base)  # meanwhile: most of loading is imports, which keep one core busy
        loaded_model, processor = load_model(
            base,
            **reading(base, place, precision, device_map, bits),
            tower_layers=(card.tower_layers or None) if card else None,
            text_layers=(card.text_layers or None) if card else None,
            feature_layers=(card.feature_layers or None) if card else None,
        )
        identity = hashed.result()
    calibration = None
    tower: str | None = ""
    if folder and card:
        prompts.set_frame(processor, card.frame)
        tower = add_tower(loaded_model, folder, card)
        check_adapter(folder, card, identity, prompts.prompt_hash(processor, card.score_form))
        loaded_model = loaded_model if card.weights == WHOLE else attach(loaded_model, folder)
        calibration = (
            Calibration.load(folder) if mode == "calibrated" or (folder / "calibration.json").is_file() else None
        )
    loaded = _experts(folder, card, calibration, mode, experts, other_experts)
    asked_with = prompts.prompt_hash(processor, card.score_form if card else "numbers")
    facts = _facts(card, identity, asked_with, loaded)
    facts["runs_on"] = f"{place.type} {precision}" + (f", {bits}-bit weights" if bits else "")
    if device_map is None and bits is None:
        loaded_model = loaded_model.to(place, TORCH_DTYPES[precision] if place.type == "cuda" else None)
    mllm = LocalMLLM(
        loaded_model,
        processor,
        facts["name"],
        autocast=place.type == "cpu" and precision == "bf16" and base is None,  # other bases are read in 16 bits
        temperature=facts["temperature"],
        tower=tower,
    )
    if card and card.probes and not bits:  # four bits move them as far as another projector would
        exact = precision == "fp32" and (base is None or checkpoint_dtype(base) == torch.float32)
        check_probes(card, probe_logits(mllm), 0.1 if exact else 1.0)
    validation = Validation.load(folder) if folder else None
    return Detector(mllm, list(loaded.values()), calibration, facts, mode, validation)


def _load_served(
    url: str,
    model: str | Path | None,
    base: str | None,
    adapter: str | Path | None,
    mode: Mode | None,
    experts: Sequence[str] | None,
) -> Detector:
    from x2dfd.served import ServedMLLM

    if not model or base is not None:
        raise SetupError("a served model goes by its name at the endpoint: give `model`, and no `base`")
    folder = Path(adapter) if adapter else None
    card = read_adapter_card(folder) if folder else None
    calibration = None
    if folder and card:
        check_contents(folder, card)
        calibration = Calibration.load(folder) if mode != "paper" or (folder / "calibration.json").is_file() else None
    mode = mode or ("calibrated" if calibration else "paper")
    loaded = _experts(folder, card, calibration, mode, experts)
    mllm = ServedMLLM(url, str(model), continues=True if card else None)
    if card and card.probes:  # an engine rounds and resizes otherwise; another model or prompt moves them further
        check_probes(card, probe_logits(mllm), 1.0)
    identity = card.base if card else {"name": mllm.name, "sha256": ""}
    facts = _facts(card, identity, card.prompt_sha256 if card else mllm.prompt_sha256, loaded)
    facts["temperature"] = 0.0  # as every endpoint is asked
    facts["served"] = {"host": mllm.host, "model": str(model)}
    validation = Validation.load(folder) if folder else None
    return Detector(mllm, list(loaded.values()), calibration, facts, mode, validation)


def _experts(
    folder: Path | None,
    card: AdapterCard | None,
    calibration: Calibration | None,
    mode: Mode,
    some: Sequence[str] | None,
    other: bool = False,
) -> dict[str, Expert]:
    """The experts asked for, by default those that the adapter was trained and calibrated with, in that order."""
    wanted = expert_hashes(card, calibration) if card else {}
    names = list(some) if some is not None else list(wanted if card else DEFAULT)
    loaded = [load_expert(n, folder / "experts" if folder else None) for n in names]
    if not other:
        _check_experts(wanted, loaded, names)
    unknown = [n for n in names if calibration and n not in calibration.weights]
    if unknown and mode == "calibrated":
        raise SetupError(
            f"the calibration does not know {', '.join(unknown)}: take mode='paper', or train and calibrate with it"
        )
    return dict(zip(names, loaded, strict=True))


def _facts(
    card: AdapterCard | None, base: dict[str, str], prompt_sha256: str, experts: dict[str, Expert]
) -> dict[str, Any]:
    """What a report says of the model."""
    return {
        "name": f"{card.name} {card.version}" if card else base["name"],
        "base": base,
        "adapter_sha256": card.sha256 if card else None,
        "layers": _layers(card) if card else None,
        "prompt_sha256": prompt_sha256,
        "crops_through": f"{CODEC[0]} {CODEC[1]}",
        "experts": {n: f"{e.card.version} {e.card.sha256}" for n, e in experts.items()},
        "in_prompt": [n for n in experts if not card or n in card.experts],
        "temperature": card.temperature if card else 0.0,
        "score_form": card.score_form if card else "numbers",
        "held_out": list(card.held_out) if card else [],
        "blind_spot": card.blind_spot if card else "",
        "licence": card.licence if card else "",
    }


def _layers(card: AdapterCard) -> dict[str, int | list[int]]:
    """As JSON gives it back: a report has to equal itself after a round trip."""
    text = card.text_layers
    return {"tower": card.tower_layers, "text": text if isinstance(text, int) else list(text)}


def _check_experts(wanted: Mapping[str, str], loaded: Sequence[Expert], names: Sequence[str]) -> None:
    for name, expert in zip(names, loaded, strict=True):
        if wanted.get(name, expert.card.sha256) != expert.card.sha256:
            raise SetupError(
                f"the adapter goes with other weights of expert {name!r} than are here: put those back that its card "
                "and calibration name, or fit it to these: x2dfd calibrate --other-experts"
            )


def evidence_of(experts: Sequence[Expert], faces: Sequence[Face], shared: Shared | None = None) -> list[list[Evidence]]:
    """What each expert says of each face: [face][expert]. The crops are taken as they are."""
    columns = [ask(expert, faces, shared) for expert in experts]
    return [list(row) for row in zip(*columns, strict=True)] if columns else [[] for _ in faces]


def _kind(evidence: Sequence[Evidence]) -> str | None:
    """The likelier kind of fake, by the first expert that tells the kinds apart."""
    told = next((e.kinds for e in evidence if e.kinds), None)
    return max(told, key=lambda kind: told[kind]) if told else None


class _Clock:
    """Seconds per stage, added up."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


class _Search:
    """Finds the faces of a file; of a clip while it is decoded, so that one frame at a time stands in memory."""

    def __init__(self) -> None:
        self.seen: list[_Seen] = []
        self.turned = 0  # degrees counterclockwise that set the picture upright, where the file does not say so
        self.seconds = 0.0
        self._left_out = 0
        self._frames = 0

    def picture(self, picture: Picture) -> None:
        faces = self._faces(picture.pixels, turning=True)
        self._left_out = len(faces[MAX_FACES:])
        self.seen = [_Seen(face, None, None) for face in faces[:MAX_FACES]]

    def frame(self, frame: Frame) -> Frame:
        """The frame without its pixels."""
        unfound = not self.seen and self._frames % TURN_EVERY == 0
        faces = self._faces(frame.pixels, turning=unfound or bool(self.turned))
        self._frames += 1
        self._left_out += len(faces[FRAME_FACES:])
        for face in faces[:FRAME_FACES]:
            self.seen.append(_Seen(replace(face, index=len(self.seen)), frame.index, frame.time_s))
        return replace(frame, pixels=_NO_PIXELS)

    def _faces(self, pixels: NDArray[np.uint8], turning: bool) -> list[Face]:
        start = time.perf_counter()
        with one_file("finding faces"):
            faces = find_faces(pixels)
            if turning and not faces:
                turns = (self.turned // 90,) if self.turned else (1, 2, 3)
                faces, turned = find_turned_faces(pixels, turns)
                self.turned = self.turned or turned
        self.seconds += time.perf_counter() - start
        return faces

    def notes(self) -> list[str]:
        """Report.warnings."""
        notes = []
        if self._left_out:
            largest = f"; a frame's {FRAME_FACES} largest are judged" if self._frames else ""
            notes.append(f"{self._left_out} smaller faces were left out{largest}")
        if self.turned:
            side = "on its head" if self.turned == 180 else "on its side"
            notes.append(f"the picture stands {side} and does not say so: faces were looked for in all four turns")
        return notes


_NO_PIXELS = np.empty((0, 0, 3), np.uint8)


def _open(source: Source, frames: int, keep: Callable[[Frame], Frame]) -> Picture | Video:
    """Decoded, with what the file's Content Credentials say."""
    media = load_media(source, max_frames=frames, keep=keep)
    if isinstance(source, Image):
        return media
    with one_file("reading Content Credentials"):
        return replace(media, provenance=read_provenance(source, media.format))


def _ready(source: Source, frames: int) -> _Ready:
    """Raises InputError, whatever the file makes a library raise; see `errors.one_file`."""
    search = _Search()
    start = time.perf_counter()
    media = _open(source, frames, search.frame)
    decoded = time.perf_counter() - start - search.seconds
    if isinstance(media, Picture):
        search.picture(media)
    summary = media_summary(media)
    if search.turned:
        summary["notes"].append(f"faces_turned:{search.turned}")
    # Two batches stand in memory: of a camera's photo 150 MB each, and the models look at the crops alone.
    if isinstance(media, Picture):
        media = replace(media, pixels=_NO_PIXELS)
    return _Ready(media, summary, search.seen, search.notes(), {"decode": decoded, "faces": search.seconds})


def _ready_or_failure(source: Source, frames: int) -> _Ready:
    try:
        return _ready(source, frames)
    except InputError as error:
        return _Ready(_failure(source, error), {}, [], [], {})


def _found_again(report: Report, source: Source) -> list[_Seen]:
    """The faces of a report's file, in the report's order. Raises InputError, also where it is another file."""
    search = _Search()
    media = load_media(source, max_frames=frames_asked(report.media) or 1, keep=search.frame)
    if report.sha256 != media.sha256:
        raise InputError("other_picture", "this is not the picture that the report is about")
    if isinstance(media, Picture):
        search.picture(media)
    return search.seen


def _areas(face: Face, cues: Sequence[Any]) -> dict[str, list[list[list[float]]]]:
    """Polygons, in picture pixels, of the areas that the cues name."""
    polygons = area_polygons(face.landmarks)
    wanted = {c.area for c in cues} & set(polygons)
    return {a: [[[round(float(x), 1), round(float(y), 1)] for x, y in q] for q in polygons[a]] for a in sorted(wanted)}


def through_codec(faces: Sequence[Face]) -> list[Face]:
    """The faces with their crops as every model sees them."""
    return [replace(f, crop=codec(f.crop, *CODEC)) for f in faces]


def _corners(face: Face) -> tuple[tuple[float, float], ...]:
    """Top left, top right and bottom left corner of the aligned crop, in picture pixels."""
    size = float(face.crop.shape[0])
    points = np.concatenate([face.crop_landmarks, np.ones((len(face.crop_landmarks), 1))], 1)
    affine, *_ = np.linalg.lstsq(points, face.landmarks, rcond=None)  # [3, 2]: crop pixels to picture pixels
    corners = np.array([[0.0, 0.0, 1.0], [size, 0.0, 1.0], [0.0, size, 1.0]]) @ affine
    return tuple((round(float(x), 1), round(float(y), 1)) for x, y in corners)


def _paper_threshold(calibration: Calibration | None) -> float:
    return calibration.mllm_threshold if calibration else 0.5


def _failure(source: Source, error: InputError) -> Failure:
    path = str(source) if isinstance(source, str | Path) else None
    digest = None
    if isinstance(source, bytes):
        digest = hashlib.sha256(source).hexdigest()
    elif path is not None and error.code != "file_too_large":
        from x2dfd.files import file_sha256

        with contextlib.suppress(OSError):  # what cannot be read has no hash
            digest = file_sha256(Path(path)) if Path(path).is_file() else None
    return Failure(path, digest, error.code, error.reason)


@cache
def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that a score depends on."""
    found = {"python": platform.python_version()}
    for name in ("x2dfd", "torch", "transformers", "peft", "ai-edge-litert", "opencv-python-headless", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
