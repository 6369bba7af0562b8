"""Runs requests with transformers, refuses those that make no good record, and writes the others down."""

import copy
import json
import math
import random
from collections import Counter
from contextlib import contextmanager

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, LogitsProcessor

GAP = 1e-4  # between the two best scores of a greedy step
NOISE = 2e-5  # what may happen to a logit in another order of summation
TRIES = 100


class Refused(Exception):
    """This prompt does not make a good record of the request."""


class Row:
    """What one prompt gave: tokens, processed scores and raw logits as (steps, vocabulary), the reason it ended.

    `begin` are the ids that the tokens follow: the prompt, or what the decoder began with."""

    def __init__(self, prompt, begin, tokens, scores, logits, finish):
        self.prompt, self.begin, self.tokens, self.scores, self.logits, self.finish = prompt, begin, tokens, scores, logits, finish

    def same(self, other):
        return self.tokens == other.tokens and self.scores.shape == other.scores.shape and np.array_equal(self.scores, other.scores)


def load(folder, attention):
    """The model in f32. Versions before 5 have another name for the type, and rotary positions under other keys."""
    config, old = AutoConfig.from_pretrained(folder), transformers.__version__ < "5"
    if old and (rope := dict(getattr(config, "rope_parameters", None) or {})):
        config.rope_theta = rope.pop("rope_theta")
        config.rope_scaling = None if rope["rope_type"] == "default" else rope
    options = {"torch_dtype": torch.float32} if old else {"dtype": torch.float32, "experts_implementation": "eager"}
    return kind(config).from_pretrained(folder, config=config, attn_implementation=attention, **options).eval()


def kind(config):
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


class Oracle:
    def __init__(self, folder, tokenizer=None, attention="eager"):
        self.attention = attention
        self.model = load(folder, attention)
        self.exact = copy.deepcopy(self.model).double()
        self.tokenizer = tokenizer
        self.reads = self.model.config.is_encoder_decoder  # prompts by an encoder
        self.vocab = self.model.config.vocab_size
        # Whether angles follow the length of a row: its logits are then not those of one uncached pass.
        self.follows = (getattr(self.model.config, "rope_parameters", None) or {}).get("rope_type") in ("dynamic", "longrope")

    def draws(self, fields):
        return bool(fields.get("do_sample", self.model.generation_config.do_sample))

    def begin(self, prompt, fields):
        """What the generated ids of a prompt follow."""
        if not self.reads:
            return prompt
        [start] = listed(fields.get("decoder_start_token_id", self.model.generation_config.decoder_start_token_id))
        [begin] = fields.get("decoder_input_ids", [[]])
        return begin if begin[:1] == [start] else [start, *begin]

    def generate(self, prompts, fields):
        """`prompts` of unequal lengths are padded: on the left, or for an encoder on the right."""
        width = max(map(len, prompts))
        pad = (lambda row: row + [0] * (width - len(row))) if self.reads else (lambda row: [0] * (width - len(row)) + row)
        ids = torch.tensor([pad(prompt) for prompt in prompts])
        mask = torch.tensor([pad([1] * len(prompt)) for prompt in prompts])
        begins = [self.begin(prompt, self.own(fields, index)) for index, prompt in enumerate(prompts)]
        config, arguments = arguments_of(fields, len(prompts))
        config = GenerationConfig(**config, return_dict_in_generate=True, output_scores=True, output_logits=True)
        torch.manual_seed(0)
        with torch.no_grad():
            if self.follows:
                self.model(ids[:1, -1:])  # one token makes the model forget the lengths of earlier calls
            output = self.model.generate(ids, attention_mask=mask, generation_config=config, tokenizer=self.tokenizer, **arguments)
        eos = self.eos(fields)
        rows = []
        for index, prompt in enumerate(prompts):
            tokens = output.sequences[index, len(begins[index]) if self.reads else width :].tolist()
            end = next((step + 1 for step, token in enumerate(tokens) if token in eos), len(tokens))
            stack = lambda steps: np.array([step[index].numpy() for step in steps[:end]])
            stopped = "stop_strings" in fields and end < fields.get("max_new_tokens", 0)
            finish = "eos" if tokens[end - 1] in eos else "stop_string" if stopped else "length"
            rows.append(Row(prompt, begins[index], tokens[:end], stack(output.scores), stack(output.logits), finish))
        return rows

    def alone(self, prompts, fields):
        return [self.generate([prompt], self.own(fields, index))[0] for index, prompt in enumerate(prompts)]

    def own(self, fields, index):
        """The fields of one prompt: of those that have a value for each, its own."""
        own = lambda value: [value[index]] if len(value) > 1 else value
        each = ("decoder_start_token_id", "decoder_input_ids")
        return {key: own(value) if key in each and isinstance(value, list) else value for key, value in fields.items()}

    def eos(self, fields):
        eos = fields.get("eos_token_id", self.model.generation_config.eos_token_id)
        return eos if isinstance(eos, list) else [eos]

    def text(self, row, fields):
        """The generated text, and what of it is left before a stop string."""
        text = self.tokenizer.decode(row.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ends = [text.find(stop) for stop in fields.get("stop_strings", []) if stop in text]
        return text, text[: min(ends)] if row.finish == "stop_string" else text

    @contextmanager
    def noise(self, seed):
        """Logits as another order of summation might give them."""
        generator = torch.Generator().manual_seed(seed)
        disturb = lambda _, __, out: out + NOISE * (2 * torch.rand(out.shape, generator=generator) - 1)
        handle = self.model.get_output_embeddings().register_forward_hook(disturb)
        try:
            yield
        finally:
            handle.remove()

    def exact_logits(self, row, fields):
        """Raw logits of every step, from one uncached pass in double precision."""
        if self.follows:
            return self.forced_logits(row, fields)
        with torch.no_grad():
            ids = torch.tensor([row.begin + row.tokens[:-1]])
            inputs = dict(input_ids=torch.tensor([row.prompt]), decoder_input_ids=ids) if self.reads else dict(input_ids=ids)
            return self.exact(**inputs, use_cache=False).logits[0, len(row.begin) - 1 :].numpy()


    def forced_logits(self, row, fields):
        """Raw logits of every step, from the generation loop in double precision, made to choose the row's tokens."""
        config = GenerationConfig(
            max_new_tokens=len(row.tokens), use_cache=fields.get("use_cache", True), return_dict_in_generate=True, output_logits=True
        )
        ids = torch.tensor([row.prompt])
        with torch.no_grad():
            self.exact(ids[:, -1:])
            force = Force(len(row.prompt), row.tokens)
            output = self.exact.generate(ids, generation_config=config, logits_processor=[force])
        assert output.sequences[0].tolist() == row.prompt + row.tokens
        return np.array([step[0].numpy() for step in output.logits])


def listed(value):
    return value if isinstance(value, list) else [value]


def arguments_of(fields, count):
    """Fields of GenerationConfig, and those that are arguments of generate() there, for so many prompts."""
    fields, arguments = copy.deepcopy(fields), {}
    if begins := fields.pop("decoder_input_ids", None):
        arguments["decoder_input_ids"] = torch.tensor(begins if len(begins) == count else begins * count)
    if negative := fields.pop("negative_prompt_ids", None):
        arguments["negative_prompt_ids"] = torch.tensor([negative])
    return fields, arguments


class Force(LogitsProcessor):
    """Leaves only the next of some tokens."""

    def __init__(self, start, tokens):
        self.start, self.tokens = start, tokens

    def __call__(self, ids, scores):
        token = self.tokens[ids.shape[1] - self.start]
        return torch.full_like(scores, -math.inf).index_fill(1, torch.tensor([token]), 0.0)


def record(oracle, family, case):
    """The line of a case, with the first prompts that make a good record."""
    refusals = Counter()
    for attempt in range(TRIES if case.rows else 1):
        choose = random.Random(f"{family}/{case.name}/{attempt}")
        try:
            prompts = case.prompts(choose, oracle)
            fields = case.fields
            if callable(fields):
                fields = fields(greedy_path(oracle, prompts[0]), prompts[0])
            rows = checked(oracle, case, prompts, fields)
            print(f"{family}/{case.name}: prompt {attempt}", flush=True)
            return line(case, fields, rows, oracle)
        except (Refused, ValueError) as refused:  # ValueError: the oracle's own
            refusals[str(refused)] += 1
    raise SystemExit(f"{family}/{case.name}: no prompt will do: {refusals}")


def greedy_path(oracle, prompt):
    fields = dict(do_sample=False, num_beams=1, max_new_tokens=16, min_new_tokens=16)
    if oracle.reads:
        fields |= dict(repetition_penalty=1.6)  # the tiny ones soon say one thing only
    path = oracle.generate([prompt], fields)[0].tokens
    if len(set(path)) < 9:
        raise Refused("dull path")
    return path


def checked(oracle, case, prompts, fields):
    rows = oracle.alone(prompts, fields)
    drawn = oracle.draws(fields)

    for row in rows:
        best = -np.sort(-row.scores, axis=1)
        gaps = best[:, 0] - best[:, 1]
        if not drawn and (gaps[~(case.ties & (gaps == 0))] < GAP).any():
            raise Refused("close call")
        if case.rows and not fields.keys() - {"max_new_tokens", "do_sample"} and len(set(row.tokens)) * 3 < len(row.tokens):
            raise Refused("dull")
        error = np.abs(row.logits - oracle.exact_logits(row, fields)).max()
        if error > NOISE:
            raise Refused(f"far from the exact logits by 1e{math.log10(error):.0f}")
        by_hand(oracle, fields, row)

    for seed in range(4 if drawn else 1):
        with oracle.noise(seed):
            noisy = oracle.alone(prompts, fields)
        for row, again in zip(rows, noisy):
            if row.scores.shape != again.scores.shape or (np.isinf(row.scores) != np.isinf(again.scores)).any():
                raise Refused("noise moves a ban")
            if not drawn and row.tokens != again.tokens:
                raise Refused("noise moves a token")

    if case.padded:
        for row, again in zip(rows, oracle.generate(prompts, fields)):
            if row.tokens != again.tokens or np.abs(row.logits - again.logits).max() > NOISE:
                raise Refused("padding matters")

    for field in fields.keys() - {"do_sample", "max_new_tokens", "max_length", *case.idle}:
        without = {key: value for key, value in fields.items() if key != field}
        try:
            others = oracle.alone(prompts, without)
        except ValueError:
            continue  # a request that needs the field
        if all(row.same(other) for row, other in zip(rows, others)):
            raise Refused(f"{field} does nothing")
    return rows


def by_hand(oracle, fields, row):
    """Processes raw logits in a few lines of numpy, if no other field than these is set, and compares."""
    known = ["sequence_bias", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_new_tokens", "suppress_tokens"]
    known += ["max_new_tokens", "eos_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p", "renormalize_logits"]
    file = oracle.model.generation_config.to_diff_dict()
    fields = {key: value for key, value in file.items() if key in known} | fields
    if fields.keys() - {*known, "num_beams"} or file.keys() & {"forced_bos_token_id", "forced_eos_token_id", "min_length"}:
        return
    drawn = oracle.draws(fields)
    for step, logits in enumerate(row.logits.astype(np.float64)):
        seen, scores = row.begin + row.tokens[:step], logits.copy()
        for ids, bias in fields.get("sequence_bias", []):
            if seen[len(seen) - len(ids) + 1 :] == ids[:-1]:
                scores[ids[-1]] += bias
        for token in set(seen):
            penalty = fields.get("repetition_penalty", 1.0)
            scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
        if (size := fields.get("no_repeat_ngram_size", 0)) and len(seen) >= size:
            for start in range(len(seen) - size + 1):
                if seen[start : start + size - 1] == seen[len(seen) - size + 1 :]:
                    scores[seen[start + size - 1]] = -np.inf
        for ids in fields.get("bad_words_ids", []):
            if seen[len(seen) - len(ids) + 1 :] == ids[:-1] and not (len(ids) == 1 and ids[0] in oracle.eos(fields)):
                scores[ids[-1]] = -np.inf
        if step < fields.get("min_new_tokens", 0):
            scores[oracle.eos(fields)] = -np.inf
        scores[fields.get("suppress_tokens", [])] = -np.inf
        if drawn:
            scores /= fields.get("temperature", 1.0)
            if top_k := fields.get("top_k", 50):
                scores[scores < np.sort(scores)[-min(top_k, len(scores))]] = -np.inf
            order = np.argsort(-scores)
            before = np.cumsum(softmax(scores)[order]) - softmax(scores)[order]
            scores[order[1:][before[1:] >= fields.get("top_p", 1.0)]] = -np.inf
            scores[softmax(scores) < fields.get("min_p", 0.0) * softmax(scores).max()] = -np.inf
        if fields.get("renormalize_logits"):
            with np.errstate(divide="ignore"):
                scores = np.log(softmax(scores))
        finite = np.isfinite(scores)
        assert (finite == np.isfinite(row.scores[step])).all(), (fields, step)
        assert np.abs(scores - row.scores[step])[finite].max() < NOISE, (fields, step)
        assert drawn or row.tokens[step] == scores.argmax(), (fields, step)


def softmax(scores):
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()


def line(case, fields, rows, oracle):
    out = dict(name=case.name)
    if case.texts:
        out["prompts"] = case.texts
    else:
        out["input_ids"] = [row.prompt for row in rows]
    out["generation_config"] = fields
    drawn = oracle.draws(fields)
    if not drawn:
        out["sequences"] = [row.tokens for row in rows]
        out["finish"] = [row.finish for row in rows]
    if case.texts and not drawn:
        out["texts"], out["trimmed"] = zip(*(oracle.text(row, fields) for row in rows))
    if scheme := fields.get("watermarking_config"):
        detector = transformers.WatermarkDetector(oracle.model.config, "cpu", copy.deepcopy(scheme))
        out["z_scores"] = [float(detector(torch.tensor([row.tokens]), return_dict=True).z_score[0]) for row in rows]
    count = oracle.vocab if drawn else 6
    out["scores"] = [[score(step, count) for step in row.scores] for row in rows]
    count = oracle.vocab if case.full else 3
    out["logits"] = [[best(step, count) for step in row.logits] for row in rows]
    return json.dumps(out, separators=(",", ":"), ensure_ascii=False)


def score(values, count):
    banned = np.flatnonzero(np.isneginf(values)).tolist()
    kept = np.flatnonzero(~np.isneginf(values)).tolist()
    out = dict(top=best(values, count))
    if banned:
        out |= dict(banned=banned) if len(banned) <= len(kept) else dict(kept=kept)
    return out


def best(values, count):
    order = sorted(np.flatnonzero(np.isfinite(values)).tolist(), key=lambda id: -values[id])
    return [[id, round(float(values[id]), 5)] for id in order[:count]]
