#!/usr/bin/env python3
"""Records what transformers' searches find, with the checkpoints that make.py made.

    oracle/bin/python tests/golden/search.py [folder ...]

5.23.0 writes the modes that it still has, beams to `search.jsonl` and guidance to `guidance.jsonl`; 4.55.4, the last
version with the others, writes those to `search-4.55.4.jsonl` and `contrasts-4.55.4.jsonl` (an environment made as
make.py says, with transformers==4.55.4). One request a line:

    name               unique in the file
    input_ids          prompts
    generation_config  the request, in Hugging Face's fields; `negative_prompt_ids` is an argument of generate() there
    sequences          [prompt][rank] generated ids; absent, as `finish` is, where they are drawn
    finish             [prompt][rank] eos or length
    sequences_scores   [prompt][rank], of modes with beams
    beam_indices       [prompt][rank][step], of 5.23.0's beams
    scores             [prompt][step] the best processed scores of the first sequence, as [id, value]

Prompts are run one by one, without padding, as make.py does. A request is recorded only if small noise on the logits
changes none of it but the last digits, and if leaving any of its fields out (but lengths, and those in `idle`) changes
the outcome; otherwise the next prompts of the case's own random sequence are tried.

A new mode is a function that yields cases, and its place in MODES.
"""

import json
import random
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from cases import Case
from contrasts import contrastive, dola, guidance
from oracle import Oracle, Refused, arguments_of, best, greedy_path
from transformers import GenerationConfig

HERE = Path(__file__).resolve().parent
BOTH = ["gpt2", "llama", "qwen2", "gemma2", "t5", "bart"]
FOLDERS = {"5.23.0": [*BOTH, "bart-legacy", "marian"], "4.55.4": BOTH}
TRIES = 200
TOLERANCE = 5e-5  # of a score under noise


def beams():
    def beam(name, rows, fields=None, idle=(), num_beams=4, **more):
        def all_fields(path, prompt):
            own = fields(path, prompt) if callable(fields) else fields or {}
            return dict(num_beams=num_beams, max_new_tokens=10) | own

        return Case(name, rows, all_fields, idle=["num_return_sequences", *idle], **more)

    two = lambda p: [p[2], p[5]]
    everything = dict(num_return_sequences=4)

    yield beam("plain", [7])
    yield beam("batch", [3, 17, 1, 9], everything)
    yield beam("two_beams", [5, 8], dict(num_return_sequences=2), num_beams=2)
    yield beam("eight_beams", [6, 4], dict(num_return_sequences=8, max_new_tokens=6), num_beams=8)
    yield beam("thirty_beams", [4], dict(num_return_sequences=5, max_new_tokens=4), num_beams=30)
    yield beam("one_token", [4, 6], everything | dict(max_new_tokens=1))
    yield beam("nothing_set", [5], dict(max_new_tokens=None))
    yield beam("max_length", [5, 8], everything | dict(max_new_tokens=None, max_length=14))
    yield beam("use_cache_false", [9, 4], everything | dict(use_cache=False), idle=["use_cache"])
    yield beam("eos", [6, 3], lambda p, _: everything | dict(eos_token_id=p[4]))
    yield beam("eos_first", [6, 3], lambda p, _: everything | dict(eos_token_id=p[0]))
    yield beam("eos_three", [6, 3, 11], lambda p, _: everything | dict(eos_token_id=[p[7], p[3], p[5]]))
    yield beam("pad_token_id", [6], lambda p, _: everything | dict(eos_token_id=two(p), pad_token_id=7), idle=["pad_token_id"])
    for early_stopping in [False, True, "never"]:
        for length_penalty in [0.0, -1.0, 0.6, 2.5]:
            yield beam(
                f"early_stopping_{early_stopping}_length_penalty_{length_penalty}".lower(),
                [6, 9],
                lambda p, _: everything
                | dict(eos_token_id=two(p), early_stopping=early_stopping, length_penalty=length_penalty, max_new_tokens=12),
                idle=[] if early_stopping is True and length_penalty > 0.5 else ["early_stopping"],
            )
        yield beam(
            f"early_stopping_{early_stopping}".lower(),
            [4, 7],
            lambda p, _: dict(eos_token_id=p[3], early_stopping=early_stopping, max_new_tokens=12, num_return_sequences=3),
            idle=["early_stopping"],
            num_beams=3,
        )
    yield beam("repetition_penalty", [9, 14], everything | dict(repetition_penalty=1.4))
    yield beam("encoder_repetition_penalty", [9], everything | dict(encoder_repetition_penalty=1.5))
    yield beam("no_repeat_ngram_size", [14, 9], everything | dict(no_repeat_ngram_size=2), alphabet=4)
    yield beam("bad_words_ids", [6, 9], lambda p, _: everything | dict(bad_words_ids=[[p[0]], [p[3]], [p[1], p[2]]]))
    yield beam("sequence_bias", [6, 9], lambda p, _: everything | dict(sequence_bias=[[[p[1]], -3.0], [[p[0], p[3]], 4.0]]))
    yield beam("suppress_tokens", [6], lambda p, _: everything | dict(suppress_tokens=[p[0], p[4]], begin_suppress_tokens=[p[2]]))
    yield beam("min_new_tokens", [6, 4], lambda p, _: everything | dict(eos_token_id=two(p), min_new_tokens=5))
    yield beam("min_length", [6, 4], lambda p, _: everything | dict(eos_token_id=two(p), min_length=9))
    yield beam("forced_bos_token_id", [1], lambda p, _: everything | dict(forced_bos_token_id=p[4]))
    yield beam("forced_eos_token_id", [6, 9], lambda p, _: everything | dict(forced_eos_token_id=p[9], eos_token_id=p[9]))
    yield beam(
        "exponential_decay_length_penalty",
        [6, 3],
        lambda p, _: everything | dict(exponential_decay_length_penalty=[2, 1.1], eos_token_id=p[9]),
    )
    yield beam("renormalize_logits", [6, 9], everything | dict(renormalize_logits=True, repetition_penalty=1.3))
    yield beam(
        "together",
        [12, 7],
        lambda p, _: everything
        | dict(
            eos_token_id=[p[4], p[8]],
            early_stopping=True,
            length_penalty=1.5,
            repetition_penalty=1.2,
            no_repeat_ngram_size=2,
            min_new_tokens=3,
            bad_words_ids=[[p[1]], [p[5], p[6]]],
        ),
        alphabet=5,
    )


def diverse_beams():
    def diverse(name, rows, fields=None, idle=(), **more):
        def all_fields(path, prompt):
            own = fields(path, prompt) if callable(fields) else fields or {}
            return dict(num_beams=4, num_beam_groups=2, diversity_penalty=1.5, max_new_tokens=8, num_return_sequences=4) | own

        return Case(f"diverse_{name}", rows, all_fields, idle=["num_return_sequences", *idle], **more)

    two = lambda p: [p[2], p[5]]

    yield diverse("plain", [7])
    yield diverse("batch", [3, 17, 1, 9])
    yield diverse("best", [5, 8], dict(num_return_sequences=1))
    yield diverse("groups_of_one", [6], dict(num_beam_groups=4))
    yield diverse("three_groups", [6, 4], dict(num_beams=6, num_beam_groups=3, num_return_sequences=6, diversity_penalty=0.7))
    yield diverse("strong", [6], dict(num_beams=6, num_beam_groups=2, num_return_sequences=6, diversity_penalty=100.0))
    yield diverse("eos", [6, 3], lambda p, _: dict(eos_token_id=p[4], max_new_tokens=12))
    yield diverse("eos_list", [6, 9], lambda p, _: dict(eos_token_id=two(p), max_new_tokens=12))
    yield diverse(
        "pad_token_id",
        [6],
        lambda p, _: dict(eos_token_id=two(p), pad_token_id=p[1], num_beams=6, num_beam_groups=3, max_new_tokens=12),
    )
    for early_stopping in [False, True, "never"]:
        for length_penalty in [0.0, -1.0, 2.0]:
            yield diverse(
                f"early_stopping_{early_stopping}_length_penalty_{length_penalty}".lower(),
                [6, 9],
                lambda p, _: dict(eos_token_id=two(p), early_stopping=early_stopping, length_penalty=length_penalty, max_new_tokens=12),
                idle=[] if early_stopping and length_penalty > 0.5 else ["early_stopping"],
            )
    yield diverse(
        "processed",
        [9, 6],
        lambda p, _: dict(
            sequence_bias=[[[p[1]], -3.0]], repetition_penalty=1.4, no_repeat_ngram_size=2, min_new_tokens=3, eos_token_id=two(p)
        ),
        alphabet=4,
    )


def forced_phrases():
    def forced(name, rows, phrases, fields=None, idle=(), **more):
        def all_fields(path, prompt):
            words = phrases(path, prompt) if callable(phrases) else phrases
            own = fields(path, prompt) if callable(fields) else fields or {}
            ends = own.get("eos_token_id", [])
            if any(str(end) in re.findall(r"\d+", str(words)) for end in (ends if isinstance(ends, list) else [ends])):
                raise Refused("an end within a phrase")
            return dict(num_beams=4, max_new_tokens=9, num_return_sequences=4, force_words_ids=words) | own

        return Case(f"forced_{name}", rows, all_fields, idle=["num_return_sequences", *idle], **more)

    two = lambda p: [p[2], p[5]]

    yield forced("token", [7], [[50]], dict(num_return_sequences=1))
    yield forced("phrase", [5, 8], [[50, 61, 72]])
    yield forced("phrases", [3, 17, 1, 9], [[50], [61, 72], [43, 44]])
    yield forced("set", [6, 9], [[[50, 61], [72]]])
    yield forced("set_with_one_head", [6, 4], [[[50, 61, 72], [50, 43], [50, 61, 44, 45]], [72]])
    yield forced("sets", [6, 4], [[[50, 61], [72]], [43, 44], [[45, 46, 47], [48]]], dict(max_new_tokens=12))
    yield forced("same_token_again", [6, 4], [[50, 50], [61, 50, 61]])
    yield forced("same_phrase_twice", [6], [[50], [50]])
    yield forced("said_anyway", [6, 4], lambda p, _: [[p[2], p[3]], [50]])
    yield forced("begun_by_the_prompt", [6], lambda _, ids: [[ids[-1], 50, 61]])
    yield forced("said_by_the_prompt", [6], lambda _, ids: [[ids[0], ids[1]], [50, 61]])
    yield forced("no_room", [6, 4], [[50, 61], [72, 43], [44, 45]], dict(max_new_tokens=4))
    yield forced("little_room", [6, 4], [[50, 61], [72]], dict(max_new_tokens=3, num_return_sequences=2))
    yield forced("two_beams", [5, 8], [[50, 61]], dict(num_beams=2, num_return_sequences=2))
    yield forced("seven_beams", [5], [[50, 61], [[72], [43, 44]]], dict(num_beams=7, num_return_sequences=7))
    yield forced("eos", [6, 3], [[50]], lambda p, _: dict(eos_token_id=p[4]))
    yield forced("eos_list", [6, 9], [[50, 61]], lambda p, _: dict(eos_token_id=[*two(p), p[7]], max_new_tokens=12))
    for early_stopping in [False, True, "never"]:
        for length_penalty in [0.0, -1.0, 2.0]:
            yield forced(
                f"early_stopping_{early_stopping}_length_penalty_{length_penalty}".lower(),
                [6, 4],
                [[50], [[61], [72, 43]]],
                lambda p, _: dict(eos_token_id=two(p), early_stopping=early_stopping, length_penalty=length_penalty, max_new_tokens=12),
                idle=["early_stopping"],
            )
    yield forced(
        "processed",
        [6],
        [[50, 61], [72]],
        lambda p, _: dict(sequence_bias=[[[p[1]], -3.0]], repetition_penalty=1.4, min_new_tokens=6, eos_token_id=two(p), max_new_tokens=12),
        idle=["min_new_tokens"],
    )
    yield forced("no_repeat_ngram_size", [6], [[50, 61], [72]], dict(no_repeat_ngram_size=2, max_new_tokens=12), alphabet=4)


def translated():
    """Beams over the states of an encoder."""

    def beam(name, rows, fields=None, idle=(), num_beams=4, **more):
        def all_fields(path, prompt):
            own = fields(path, prompt) if callable(fields) else fields or {}
            return dict(num_beams=num_beams, max_new_tokens=10, num_return_sequences=num_beams) | own

        return Case(name, rows, all_fields, idle=["num_return_sequences", "num_beams", *idle], **more)

    two = lambda p: [p[2], p[5]]
    yield beam("batch", [3, 17, 1, 9])
    yield beam("as_the_file_says", [8, 5], dict(num_beams=None, max_new_tokens=None, num_return_sequences=1))
    yield beam(
        "translation", [6, 12], lambda p, _: dict(early_stopping=True, no_repeat_ngram_size=3, eos_token_id=two(p), max_new_tokens=14),
        idle=["no_repeat_ngram_size", "early_stopping"], num_beams=5,
    )  # fmt: skip
    yield beam("length_penalty", [6, 9], lambda p, _: dict(eos_token_id=two(p), length_penalty=-1.0, max_new_tokens=12))
    yield beam(
        "processed", [9, 6],
        lambda p, _: dict(encoder_repetition_penalty=1.4, repetition_penalty=1.2, forced_bos_token_id=p[4], min_length=5, eos_token_id=two(p)),
        idle=["min_length"],
    )  # fmt: skip
    yield beam("decoder_input_ids", [6, 4, 9], lambda p, _: dict(decoder_input_ids=[p[1:4], p[2:5], p[5:8]]))
    yield beam("encoder_no_repeat_ngram_size", [9, 5], dict(encoder_no_repeat_ngram_size=1))


def translated_otherwise():
    """The modes of 4.55.4."""

    def case(name, rows, own, fields, idle=(), **more):
        made = lambda part, path: part(path) if callable(part) else part
        all_fields = lambda path, _: dict(max_new_tokens=10) | fields | made(own, path)
        return Case(name, rows, all_fields, idle=["num_return_sequences", "top_k", *idle], **more)

    groups = dict(num_beams=4, num_beam_groups=2, diversity_penalty=1.5, num_return_sequences=4)
    yield case("diverse_batch", [3, 17, 1, 9], {}, groups)
    yield case("diverse_eos", [6, 3], lambda p: dict(eos_token_id=[p[2], p[5]], length_penalty=2.0), groups, idle=["length_penalty"])
    words = dict(num_beams=4, num_return_sequences=4)
    yield case("forced_batch", [3, 17, 9], dict(force_words_ids=[[50, 61], [72]]), words)
    yield case("forced_eos", [6, 4], lambda p: dict(force_words_ids=[[[50, 61], [43]]], eos_token_id=[p[2], p[5]]), words)
    states = dict(penalty_alpha=0.6, top_k=4)
    yield case("contrastive_batch", [3, 17, 1, 9], {}, states)
    yield case("contrastive_long", [12], dict(max_new_tokens=30), states)
    yield case("contrastive_eos", [6, 3], lambda p: dict(eos_token_id=p[0:6:2], max_new_tokens=20), states)
    yield case("contrastive_processed", [9, 6], lambda p: dict(repetition_penalty=1.3, suppress_tokens=[p[0]]), states)


# By version and file.
MODES = {
    "5.23.0": {"search.jsonl": [beams], "guidance.jsonl": [guidance]},
    "4.55.4": {"search-4.55.4.jsonl": [diverse_beams, forced_phrases], "contrasts-4.55.4.jsonl": [contrastive, dola]},
}

# Of folders whose models have an encoder.
READERS = {
    "5.23.0": {"search.jsonl": [translated]},
    "4.55.4": {"search-4.55.4.jsonl": [translated_otherwise]},
}

# 4.55.4 finds no layer in the lower half of three with a tied head, and fails.
IMPOSSIBLE = {("gemma2", "dola_low")}


class Found:
    """What a search made of one prompt."""

    def __init__(self, oracle, prompt, fields):
        begin = oracle.begin(prompt, fields)
        fields, more = arguments_of(fields, 1)
        self.drawn = fields.get("do_sample", False)
        config = GenerationConfig(**fields, return_dict_in_generate=True, output_scores=True)
        ids = torch.tensor([prompt])
        with torch.no_grad():
            output = oracle.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, **more)
        eos = oracle.eos(fields)
        self.prompt = prompt
        self.sequences = []
        self.scores = output.sequences_scores.tolist() if output.get("sequences_scores") is not None else None
        # 4.55.4 mixes up the indices of groups, and its constrained beams have none worth keeping.
        indices = output.get("beam_indices") if transformers.__version__ == "5.23.0" else None
        self.indices = None if indices is None else [[beam for beam in row if beam >= 0] for row in indices.tolist()]
        for rank, tokens in enumerate(output.sequences[:, len(begin) :].tolist()):
            # What follows is padding.
            end = next((step + 1 for step, token in enumerate(tokens) if token in eos), len(tokens))
            self.sequences.append(tokens[: len(self.indices[rank]) if self.indices else end])
        self.finish = ["eos" if tokens[-1] in eos else "length" for tokens in self.sequences]
        beams = self.indices[0] if self.indices else [0] * len(self.sequences[0])
        self.steps = [step[beam].numpy() for step, beam in zip(output.scores, beams)]
        if self.scores and not self.indices:
            self.steps = None  # nobody knows which beam they belong to

    def outcome(self):
        if self.drawn:
            return [best(step, 9) for step in self.steps]
        return self.sequences, self.indices, self.finish

    def near(self, other):
        bound = lambda score: TOLERANCE * max(1.0, abs(score))
        scores = zip(self.scores or [], other.scores or [])
        return (self.drawn or self.outcome() == other.outcome()) and all(abs(a - b) <= bound(a) for a, b in scores)

    def same(self, other):
        return self.outcome() == other.outcome() and self.scores == other.scores


def record(oracle, folder, case):
    refusals = Counter()
    for attempt in range(TRIES):
        choose = random.Random(f"{folder}/{case.name}/{attempt}")
        try:
            prompts = case.prompts(choose, oracle)
            fields = case.fields
            if callable(fields):
                fields = fields(greedy_path(oracle, prompts[0]), prompts[0])
            fields = {key: value for key, value in fields.items() if value is not None}
            found = checked(oracle, case, prompts, fields)
            print(f"{folder}/{case.name}: prompt {attempt}", flush=True)
            return line(case, fields, found)
        except (Refused, ValueError, RuntimeError) as refused:  # the last two: the oracle's own
            refusals[str(refused)] += 1
    raise SystemExit(f"{folder}/{case.name}: no prompt will do: {refusals}")


def checked(oracle, case, prompts, fields):
    run = lambda fields: [Found(oracle, prompt, oracle.own(fields, index)) for index, prompt in enumerate(prompts)]
    found = run(fields)
    for field in fields.keys() - {"max_new_tokens", "max_length", *case.idle}:
        without = {key: value for key, value in fields.items() if key != field}
        try:
            others = run(without)
        except (ValueError, RuntimeError):
            continue  # a request that needs the field
        if all(one.same(other) for one, other in zip(found, others)):
            raise Refused(f"{field} does nothing")
    for seed in range(4):
        with oracle.noise(seed):
            again = run(fields)
        if not all(one.near(other) for one, other in zip(found, again)):
            raise Refused("noise changes it")
    return found


def line(case, fields, found):
    out = dict(name=case.name, input_ids=[one.prompt for one in found], generation_config=fields)
    if not found[0].drawn:
        out["sequences"] = [one.sequences for one in found]
        out["finish"] = [one.finish for one in found]
    if found[0].scores:
        out["sequences_scores"] = [[round(score, 5) for score in one.scores] for one in found]
    if found[0].indices:
        out["beam_indices"] = [one.indices for one in found]
    if found[0].steps:
        out["scores"] = [[best(step, 9 if one.drawn else 3) for step in one.steps] for one in found]
    return json.dumps(out, separators=(",", ":"))


def main(folders):
    version = transformers.__version__
    if version not in MODES:
        sys.exit(f"transformers {' and '.join(MODES)} are the references, this is {version}")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for folder in folders or FOLDERS[version]:
        oracle = Oracle(HERE / folder)
        for name, modes in (READERS if oracle.reads else MODES)[version].items():
            cases = [case for mode in modes for case in mode() if (folder, case.name) not in IMPOSSIBLE]
            lines = [record(oracle, folder, case) for case in cases]
            (HERE / folder / name).write_text("".join(line + "\n" for line in lines))
            print(f"{folder}/{name}: {len(lines)} cases of {version}")


if __name__ == "__main__":
    main(sys.argv[1:])
