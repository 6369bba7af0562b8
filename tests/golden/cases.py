"""The requests that golden folders record."""

class Case:
    """A request: prompts of the lengths `rows`, or `texts`; `fields` is the config, or a function of row 0's greedy path and prompt."""

    def __init__(self, name, rows, fields, idle=(), ties=False, alphabet=None, full=False, padded=False, texts=None):
        self.name, self.rows, self.fields, self.texts = name, rows, fields, texts
        self.idle = idle  # fields that are not expected to change anything
        self.ties = ties  # whether the best scores may be exactly equal
        self.alphabet = alphabet  # so many different ids in the prompts, so that n-grams repeat
        self.full = full  # records every logit
        self.padded = padded  # whether a left-padded batch has to give the same

    def prompts(self, choose, oracle):
        if self.texts:
            return [oracle.tokenizer(text).input_ids for text in self.texts]
        words = range(4, oracle.vocab - 1)  # neither special nor GPT-2's end
        if self.alphabet:
            words = choose.sample(words, self.alphabet)
        return [choose.choices(words, k=length) for length in self.rows]


def short():
    """Requests that show that a checkpoint is read and computed as it should be."""
    yield Case("plain", [7], dict(max_new_tokens=6), full=True)
    yield Case("batch", [3, 17, 1, 9], dict(max_new_tokens=8), padded=True)
    yield Case("long", [4], dict(max_new_tokens=60))
    yield Case("long_prompt", [40, 23], dict(max_new_tokens=6), padded=True)
    yield Case(
        "combined",
        [6, 9],
        lambda p, _: dict(max_new_tokens=10, repetition_penalty=1.3, suppress_tokens=[p[1]], renormalize_logits=True),
    )
    yield Case("sample", [8], dict(max_new_tokens=1, do_sample=True, temperature=0.8, top_k=12, top_p=0.8))


def varied():
    """The same for families whose tiny models soon say one thing only: a penalty keeps them going."""
    yield Case("plain", [7], dict(max_new_tokens=6, repetition_penalty=1.6), full=True)
    yield Case("batch", [3, 17, 1, 9], dict(max_new_tokens=8, repetition_penalty=1.6), padded=True)
    yield Case("long", [4], dict(max_new_tokens=50, repetition_penalty=1.6))
    yield Case("long_prompt", [40, 23], dict(max_new_tokens=6, repetition_penalty=1.6), padded=True)
    yield Case("sample", [8], dict(max_new_tokens=1, do_sample=True, temperature=0.8, top_k=12, top_p=0.8))


def far():
    """Positions that bf16 does not tell apart."""
    yield from varied()
    yield Case("far", [300], dict(max_new_tokens=12, repetition_penalty=1.6))


def crossing():
    """For rotations that change past 24 positions: rows before, at and past it, and those that cross it."""
    yield Case("plain", [7], dict(max_new_tokens=6), full=True)
    yield Case("batch", [3, 9, 1, 5], dict(max_new_tokens=8), padded=True)
    yield Case("crosses", [10], dict(max_new_tokens=30))
    yield Case("crosses_from_everywhere", [20, 3, 23, 24, 25], dict(max_new_tokens=8))
    yield Case("long_prompt", [40, 30], dict(max_new_tokens=6))
    yield Case("combined", [18, 22], lambda p, _: dict(max_new_tokens=12, repetition_penalty=1.3, suppress_tokens=[p[1]]))
    yield Case("use_cache_false", [20], dict(max_new_tokens=10, use_cache=False), idle=["use_cache"])
    yield Case("sample", [30], dict(max_new_tokens=1, do_sample=True, temperature=0.8, top_k=12, top_p=0.8))


def full():
    """Every processor alone and in company, and every way to set a length."""
    yield from short()
    yield from lengths()
    yield from penalties()
    yield from bans()
    yield from forced()
    yield from combinations()
    yield from sampling()
    yield from watermarks()


def lengths():
    yield Case("nothing_set", [5], {})
    yield Case("nothing_set_near_the_context", [50], {})
    yield Case("max_length", [5, 8], dict(max_length=14))
    yield Case("max_new_tokens_over_max_length", [5], dict(max_new_tokens=6, max_length=30))
    yield Case("max_new_tokens_over_a_smaller_max_length", [9], dict(max_new_tokens=6, max_length=4))
    yield Case("min_length", [5, 7], lambda p, _: dict(max_new_tokens=9, eos_token_id=p[2], min_length=11))
    yield Case("min_new_tokens", [5, 7], lambda p, _: dict(max_new_tokens=9, eos_token_id=p[2], min_new_tokens=5))
    yield Case(
        "min_new_tokens_over_min_length",
        [5],
        lambda p, _: dict(max_new_tokens=9, eos_token_id=p[2], min_new_tokens=5, min_length=13),
        idle=["min_length"],
    )
    yield Case(
        "min_length_above_max_length",
        [5],
        lambda p, _: dict(max_length=12, eos_token_id=p[3], min_length=30),
    )
    yield Case("eos", [6], lambda p, _: dict(max_new_tokens=12, eos_token_id=p[6]))
    yield Case("eos_first", [6], lambda p, _: dict(max_new_tokens=12, eos_token_id=p[0]))
    yield Case("eos_list", [6, 3, 11], lambda p, _: dict(max_new_tokens=12, eos_token_id=[p[9], p[4]]), padded=True)
    yield Case("eos_list_min_new_tokens", [6], lambda p, _: dict(max_new_tokens=12, eos_token_id=[p[1], p[4]], min_new_tokens=6))
    yield Case("use_cache_false", [9, 4], dict(max_new_tokens=8, use_cache=False), idle=["use_cache"], padded=True)
    yield Case("prefill_chunk_size", [17, 9], dict(max_new_tokens=8, prefill_chunk_size=3), idle=["prefill_chunk_size"])
    yield Case("prefill_chunk_size_1", [11], dict(max_new_tokens=4, prefill_chunk_size=1), idle=["prefill_chunk_size"])
    sampling_fields = dict(temperature=0.3, top_k=3, top_p=0.2, min_p=0.5, typical_p=0.2, epsilon_cutoff=0.1, eta_cutoff=0.1, top_h=0.1)
    beam_fields = dict(length_penalty=2.0)
    yield Case(
        "fields_of_other_modes",
        [6],
        dict(max_new_tokens=8) | sampling_fields | beam_fields,
        idle=[*sampling_fields, *beam_fields],
    )


def penalties():
    yield Case("repetition_penalty", [9, 14], dict(max_new_tokens=12, repetition_penalty=1.4), padded=True)
    yield Case("repetition_penalty_below_1", [9], dict(max_new_tokens=10, repetition_penalty=0.8))
    yield Case("encoder_repetition_penalty", [9, 14], dict(max_new_tokens=10, encoder_repetition_penalty=1.5))
    yield Case("encoder_repetition_penalty_below_1", [9], dict(max_new_tokens=10, encoder_repetition_penalty=0.6))
    yield Case("sequence_bias", [6, 9], lambda p, _: dict(max_new_tokens=10, sequence_bias=[[[p[1]], -4.0], [[p[7]], 3.5]]))
    yield Case(
        "sequence_bias_of_sequences",
        [6, 9],
        lambda p, _: dict(max_new_tokens=10, sequence_bias=[[[p[1], p[2]], -6.5], [[p[3], p[4], p[5]], -7.0], [[p[0]], 0.5]]),
    )
    yield Case(
        "sequence_bias_adds_up",
        [6],
        lambda p, _: dict(max_new_tokens=8, sequence_bias=[[[p[1]], -1.5], [[p[0], p[1]], -2.5]]),
    )
    yield Case(
        "sequence_bias_prefix_is_the_context",
        [2],
        lambda p, prompt: dict(max_new_tokens=6, sequence_bias=[[[*prompt, p[0]], -9.0]]),
    )
    yield Case(
        "exponential_decay_length_penalty",
        [6, 3],
        lambda p, _: dict(max_new_tokens=20, exponential_decay_length_penalty=[3, 1.3], eos_token_id=p[9]),
    )
    yield Case(
        "exponential_decay_length_penalty_eos_list",
        [6],
        lambda p, _: dict(max_new_tokens=20, exponential_decay_length_penalty=[2, 1.4], eos_token_id=[p[9], p[11]]),
    )
    yield Case("renormalize_logits", [6, 9], dict(max_new_tokens=8, renormalize_logits=True))


def bans():
    yield Case("no_repeat_ngram_size_1", [6, 4], dict(max_new_tokens=12, no_repeat_ngram_size=1))
    yield Case("no_repeat_ngram_size_2", [14, 9], dict(max_new_tokens=24, no_repeat_ngram_size=2), alphabet=4)
    yield Case("no_repeat_ngram_size_3", [24, 12], dict(max_new_tokens=36, no_repeat_ngram_size=3), alphabet=3)
    yield Case("encoder_no_repeat_ngram_size_1", [9, 14], dict(max_new_tokens=10, encoder_no_repeat_ngram_size=1))
    yield Case("encoder_no_repeat_ngram_size_2", [20, 9], dict(max_new_tokens=12, encoder_no_repeat_ngram_size=2))
    yield Case("encoder_no_repeat_ngram_size_3", [30], dict(max_new_tokens=12, encoder_no_repeat_ngram_size=3), alphabet=6)
    yield Case("bad_words_ids", [6, 9], lambda p, _: dict(max_new_tokens=10, bad_words_ids=[[p[0]], [p[3]]]))
    yield Case(
        "bad_words_ids_of_sequences",
        [6, 9],
        lambda p, _: dict(max_new_tokens=12, bad_words_ids=[[p[1], p[2]], [p[3], p[4], p[5]]]),
    )
    yield Case(
        "bad_words_ids_prefix_is_the_context", [1], lambda p, prompt: dict(max_new_tokens=6, bad_words_ids=[[*prompt, p[0]]])
    )
    yield Case(
        "bad_words_ids_leave_eos",
        [6],
        lambda p, _: dict(max_new_tokens=10, eos_token_id=[p[7], p[8]], bad_words_ids=[[p[7]], [p[9]], [p[1], p[2]], [p[8]]]),
    )
    yield Case("suppress_tokens", [6, 9], lambda p, _: dict(max_new_tokens=10, suppress_tokens=[p[0], p[4], p[6]]))
    yield Case("begin_suppress_tokens", [6, 9], lambda p, _: dict(max_new_tokens=10, begin_suppress_tokens=[p[0], p[1]]))
    yield Case(
        "begin_suppress_tokens_after_forced_bos",
        [1],
        lambda p, _: dict(max_new_tokens=8, forced_bos_token_id=p[0], begin_suppress_tokens=[p[1]]),
        idle=["forced_bos_token_id"],
    )


def forced():
    yield Case("forced_bos_token_id", [1], lambda p, _: dict(max_new_tokens=8, forced_bos_token_id=p[4]))
    yield Case(
        "forced_bos_token_id_longer_prompt",
        [2],
        lambda p, _: dict(max_new_tokens=6, forced_bos_token_id=p[4]),
        idle=["forced_bos_token_id"],
    )
    yield Case("forced_eos_token_id", [6, 9], lambda p, _: dict(max_new_tokens=7, forced_eos_token_id=p[9], eos_token_id=p[9]))
    yield Case("forced_eos_token_id_max_length", [6, 9], dict(max_length=14, forced_eos_token_id=50))
    yield Case("forced_eos_token_id_list", [6, 9], dict(max_new_tokens=6, forced_eos_token_id=[60, 50]), ties=True)
    yield Case(
        "remove_invalid_values",
        [6],
        lambda p, _: dict(max_new_tokens=8, remove_invalid_values=True, bad_words_ids=[[p[1]], [p[2]]]),
    )


def combinations():
    yield Case(
        "penalties_together",
        [8, 12],
        lambda p, _: dict(
            max_new_tokens=14,
            sequence_bias=[[[p[1]], -3.0], [[p[0], p[3]], 4.0]],
            encoder_repetition_penalty=1.2,
            repetition_penalty=1.3,
            bad_words_ids=[[p[2]], [p[5], p[6]]],
            renormalize_logits=True,
        ),
    )
    yield Case(
        "n_grams_together",
        [16, 9],
        lambda p, _: dict(
            max_new_tokens=20, no_repeat_ngram_size=2, encoder_no_repeat_ngram_size=1, repetition_penalty=0.9, suppress_tokens=[p[1]]
        ),
        alphabet=4,
    )
    yield Case(
        "ends_together",
        [6, 9],
        lambda p, _: dict(
            max_new_tokens=16,
            eos_token_id=[p[3], p[10]],
            min_new_tokens=6,
            exponential_decay_length_penalty=[5, 1.2],
            begin_suppress_tokens=[p[0]],
        ),
    )
    yield Case(
        "forced_then_valid",
        [1],
        lambda p, _: dict(
            max_length=9, forced_bos_token_id=p[4], forced_eos_token_id=p[6], remove_invalid_values=True, suppress_tokens=[p[5]]
        ),
    )
    yield Case(
        "banned_end_is_not_decayed",
        [6],
        lambda p, _: dict(max_new_tokens=14, eos_token_id=p[7], min_new_tokens=8, exponential_decay_length_penalty=[1, 1.1]),
    )
    yield Case(
        "all_together",
        [12, 7],
        lambda p, _: dict(
            max_new_tokens=18,
            eos_token_id=[p[4], p[12]],
            sequence_bias=[[[p[0]], -2.0], [[p[1], p[2]], 3.0]],
            encoder_repetition_penalty=1.1,
            repetition_penalty=1.2,
            no_repeat_ngram_size=2,
            encoder_no_repeat_ngram_size=2,
            bad_words_ids=[[p[1]], [p[5], p[6]]],
            min_new_tokens=6,
            forced_eos_token_id=p[12],
            exponential_decay_length_penalty=[8, 1.05],
            suppress_tokens=[p[9]],
            begin_suppress_tokens=[p[3]],
            renormalize_logits=True,
        ),
        idle=["encoder_no_repeat_ngram_size"],  # the other rule bans all that this one does
        alphabet=5,
    )


def sampling():
    def sample(name, idle=(), rows=(6, 9), **fields):
        return Case(name, list(rows), dict(max_new_tokens=1, do_sample=True) | fields, idle=idle)

    yield sample("sample_default")
    yield sample("temperature", temperature=0.7, top_k=0)
    yield sample("temperature_above_1", temperature=1.8, top_k=0)
    yield sample("top_k", top_k=7)
    yield sample("top_k_above_the_vocabulary", top_k=5000)
    yield sample("top_p", top_p=0.9, top_k=0)
    yield sample("top_p_0", top_p=0.0, top_k=0, idle=["top_k"])
    yield sample("top_p_small", top_p=0.3, top_k=0, idle=["top_k"])
    yield sample("min_p", min_p=0.05, top_k=0, idle=["top_k"])
    yield sample("min_p_1", min_p=1.0, top_k=0, idle=["top_k"])
    yield sample("typical_p", typical_p=0.5, top_k=0)
    yield sample("typical_p_small", typical_p=0.1, top_k=0, idle=["top_k"])
    yield sample("epsilon_cutoff", epsilon_cutoff=0.01, top_k=0, idle=["top_k"])
    yield sample("epsilon_cutoff_above_all", epsilon_cutoff=0.99, top_k=0, idle=["top_k"])
    yield sample("eta_cutoff", eta_cutoff=0.02, top_k=0, idle=["top_k"])
    yield sample("top_h", top_h=0.4, top_k=0, idle=["top_k"])
    yield sample("top_h_large", top_h=0.9, top_k=0, idle=["top_k"])
    yield sample("usual", temperature=0.7, top_k=20, top_p=0.9)
    yield sample("hot_min_p", temperature=1.5, top_k=0, min_p=0.1, idle=["top_k"])
    yield sample("top_p_typical", top_k=0, top_p=0.9, typical_p=0.6, renormalize_logits=True, idle=["top_k"])
    yield sample("epsilon_eta", top_k=0, temperature=1.3, epsilon_cutoff=0.004, eta_cutoff=0.02, idle=["top_k", "epsilon_cutoff"])
    yield sample("top_h_top_k", temperature=1.5, top_h=0.25, top_k=40, idle=["top_k"])
    yield sample("penalised", repetition_penalty=1.6, temperature=0.9, top_k=30, top_p=0.85, renormalize_logits=True, idle=["top_k"])
    yield sample("narrow", temperature=0.9, top_h=0.7, top_k=15, top_p=0.95, min_p=0.02, typical_p=0.8, epsilon_cutoff=0.003,
                 eta_cutoff=0.003, idle=["top_h", "top_k", "top_p", "min_p", "epsilon_cutoff", "eta_cutoff"])  # fmt: skip


def watermarks():
    def mark(name, rows=(6, 9), more={}, **scheme):
        return Case(name, list(rows), dict(max_new_tokens=12, watermarking_config=scheme) | more)

    yield mark("watermark", greenlist_ratio=0.25, bias=2.0, hashing_key=15485863, seeding_scheme="lefthash", context_width=1)
    yield mark("watermark_selfhash", greenlist_ratio=0.4, bias=2.5, hashing_key=-7, seeding_scheme="selfhash", context_width=3)
    yield mark(
        "watermark_after_a_penalty", more=dict(repetition_penalty=1.3, renormalize_logits=True), greenlist_ratio=0.5, bias=1.5,
        hashing_key=99, seeding_scheme="lefthash", context_width=2,
    )  # fmt: skip


def sources():
    """For models whose encoder reads the prompt."""
    keep = dict(repetition_penalty=1.6)
    yield Case("plain", [7], keep | dict(max_new_tokens=5), full=True)
    yield Case("batch", [3, 17, 1, 9], keep | dict(max_new_tokens=8), padded=True)
    yield Case("long", [4], keep | dict(max_new_tokens=40))
    yield Case("long_source", [55, 23], keep | dict(max_new_tokens=6), padded=True)
    yield Case("sample", [8], dict(max_new_tokens=1, do_sample=True, temperature=0.8, top_k=12, top_p=0.8))
    yield Case("decoder_input_ids", [5, 9], lambda p, _: keep | dict(max_new_tokens=5, decoder_input_ids=[p[2:5]]), padded=True)


def sources_forced():
    """For a checkpoint whose generation_config.json forces the end: the only token of a draw would be that."""
    return [case for case in sources() if case.name != "sample"]


def sources_full():
    """With all that is about sources and starts."""
    keep = dict(repetition_penalty=1.6)
    yield from sources()
    yield Case("nothing_set", [5], keep)
    yield Case("max_length", [5, 30], keep | dict(max_length=9))
    yield Case("min_length", [5, 7], lambda p, _: keep | dict(max_new_tokens=9, eos_token_id=p[2], min_length=6), padded=True)
    yield Case("eos_list", [6, 3, 11], lambda p, _: keep | dict(max_new_tokens=12, eos_token_id=[p[9], p[4]]), padded=True)
    yield Case("use_cache_false", [9, 4], keep | dict(max_new_tokens=6, use_cache=False), idle=["use_cache"], padded=True)
    yield Case("decoder_start_token_id", [5], keep | dict(max_new_tokens=5, decoder_start_token_id=30))
    yield Case(
        "decoder_start_token_id_of_each", [5, 8, 3], keep | dict(max_new_tokens=5, decoder_start_token_id=[30, 41, 52]), padded=True
    )
    yield Case(
        "decoder_input_ids_of_each", [5, 8],
        lambda p, _: keep | dict(max_new_tokens=5, decoder_input_ids=[[30, p[1], p[2]], [30, p[4], p[7]]], decoder_start_token_id=30),
        idle=["decoder_start_token_id"], padded=True,
    )  # fmt: skip
    yield Case("forced_bos_token_id", [4, 9], lambda p, _: keep | dict(max_new_tokens=5, forced_bos_token_id=p[4]), padded=True)
    yield Case(
        "forced_eos_token_id", [6, 9], lambda p, _: keep | dict(max_new_tokens=5, forced_eos_token_id=p[9], eos_token_id=p[9]), padded=True
    )
    yield Case("encoder_repetition_penalty", [9, 14], dict(max_new_tokens=7, encoder_repetition_penalty=2.5))
    yield Case("encoder_no_repeat_ngram_size_1", [9, 14], keep | dict(max_new_tokens=7, encoder_no_repeat_ngram_size=1))
    yield Case("bad_words_ids", [6, 9], lambda p, _: keep | dict(max_new_tokens=7, bad_words_ids=[[p[0]], [p[3], p[4]]]))
    yield Case(
        "together", [12, 7],
        lambda p, _: dict(
            max_new_tokens=9, eos_token_id=[p[4], p[9]], repetition_penalty=1.5, encoder_repetition_penalty=1.3, min_new_tokens=4,
            forced_bos_token_id=p[6], suppress_tokens=[p[1]], renormalize_logits=True,
        ),
        idle=["min_new_tokens"],
    )  # fmt: skip


def sources_file():
    """For a checkpoint whose config.json says how to generate, with beams."""
    one = dict(num_beams=1)
    yield Case("plain", [7], one, full=True, idle=["num_beams"])
    yield Case("batch", [3, 17, 9], one | dict(no_repeat_ngram_size=1), idle=["num_beams"], padded=True)
    yield Case("max_new_tokens", [5, 8], one | dict(max_new_tokens=12), idle=["num_beams"])


def sampling_file():
    """For a checkpoint whose generation_config.json samples and penalises: what a request leaves out comes from there."""
    yield Case("plain", [7], dict(do_sample=False, repetition_penalty=1.0, max_new_tokens=6), full=True)
    yield Case("batch", [3, 17, 1, 9], dict(do_sample=False, max_new_tokens=8), padded=True)
    yield Case("long", [4], dict(do_sample=False, max_new_tokens=60))
    yield Case("long_prompt", [40, 23], dict(do_sample=False, max_new_tokens=6), padded=True)
    yield Case("sample_as_the_file_says", [8, 5], dict(max_new_tokens=1))
    yield Case("sample_hotter_than_the_file", [8], dict(max_new_tokens=1, temperature=1.4, top_p=0.95, repetition_penalty=1.0))
    yield Case("prefill_chunk_size", [17, 9], dict(do_sample=False, max_new_tokens=8, prefill_chunk_size=4), idle=["prefill_chunk_size"])
    yield Case("use_cache_false", [9], dict(do_sample=False, max_new_tokens=8, use_cache=False), idle=["use_cache"])


def story():
    """For the storyteller: text in, text out."""

    def tell(name, fields, *texts, **more):
        return Case(name, None, fields, texts=texts or ["Once upon a time", "The old woman said to the cat:"], **more)

    fox = "The fox went to the king and"
    yield tell("batch", dict(max_new_tokens=30), padded=True)
    yield tell("single_words", dict(max_new_tokens=12), "A", "I", "The princess", padded=True)
    yield tell("unusual_characters", dict(max_new_tokens=24), "“Où est l'été?” — 猫は 🦊 said", "\n\n  Chapter\t2\n")
    yield tell("bad_words_ids", lambda p, _: dict(max_new_tokens=24, bad_words_ids=[[p[0]], [p[2], p[3]]]), fox)
    yield tell("long", dict(max_new_tokens=120, no_repeat_ngram_size=3, repetition_penalty=1.05))
    yield tell("end", dict(max_new_tokens=60, exponential_decay_length_penalty=[8, 1.2]))
    # After its first word the story has a fox of four bytes, each a token, then the first two bytes of a dash, unfinished.
    fox_bytes, half_a_dash = [178, 259, 105, 238], 405
    yield tell(
        "bytes",
        lambda p, _: dict(
            max_new_tokens=14,
            sequence_bias=[[[a, b], 60.0] for a, b in zip([p[0], *fox_bytes], [*fox_bytes, half_a_dash])],
        ),
        fox,
    )
    yield tell(
        "ends_inside_a_character",
        lambda p, _: dict(max_new_tokens=4, sequence_bias=[[[a, b], 60.0] for a, b in zip([p[0], *fox_bytes], fox_bytes)]),
        fox,
    )
    yield tell("stop_strings", dict(max_new_tokens=60, stop_strings=["."]))
    yield tell("stop_strings_across_tokens", dict(max_new_tokens=60, stop_strings=["was a lit", "d three s", "ng, and"]))
    yield tell("stop_strings_inside_a_token", dict(max_new_tokens=60, stop_strings=["andso", "ingd", "oungest", "rinces"]))
    yield tell("stop_strings_never_met", dict(max_new_tokens=20, stop_strings=["Zanzibar"]), fox, idle=["stop_strings"])
    yield tell("sample", dict(max_new_tokens=1, do_sample=True, temperature=1.2, top_k=20, top_p=0.9))


SUITES = dict(short=short, varied=varied, far=far, crossing=crossing, full=full, sampling_file=sampling_file, sources=sources,
              sources_full=sources_full, sources_forced=sources_forced,
              sources_file=sources_file, story=story)  # fmt: skip
