"""Cases of contrastive search, DoLa and classifier-free guidance for search.py."""

from cases import Case


def mode(name, rows, own, fields, idle=(), **more):
    """A case whose fields are `own` over the mode's `fields`; both may be functions of the greedy path and the prompt."""
    made = lambda part, path, prompt: part(path, prompt) if callable(part) else part
    all_fields = lambda path, prompt: dict(max_new_tokens=12) | made(fields, path, prompt) | made(own, path, prompt)
    return Case(name, rows, all_fields, idle=idle, **more)


def contrastive():
    def contrastive(name, rows, own={}, idle=(), **more):
        return mode(f"contrastive_{name}", rows, own, dict(penalty_alpha=0.6, top_k=4), idle=["top_k", *idle], **more)

    yield contrastive("plain", [7])
    yield contrastive("batch", [3, 17, 1, 9])
    yield contrastive("two_candidates", [5, 8], dict(top_k=2, penalty_alpha=0.4))
    yield contrastive("nine_candidates", [5, 8], dict(top_k=9, penalty_alpha=0.3))
    yield contrastive("weak", [6, 11], dict(penalty_alpha=0.1, top_k=6), idle=["penalty_alpha"])
    yield contrastive("only_unlike", [6, 11], dict(penalty_alpha=1.0))
    yield contrastive("long", [4], dict(max_new_tokens=40))
    yield contrastive("long_prompt", [40, 23])
    yield contrastive("max_length", [5, 8], dict(max_new_tokens=None, max_length=14))
    yield contrastive("one_token", [4, 6], dict(max_new_tokens=1))
    yield contrastive("eos", [6, 3], lambda p, _: dict(eos_token_id=p[1], max_new_tokens=20))
    yield contrastive("eos_list", [6, 3, 11], lambda p, _: dict(eos_token_id=p[0:6:2], max_new_tokens=24))
    yield contrastive(
        "processed",
        [9, 6],
        lambda p, _: dict(
            repetition_penalty=1.3, no_repeat_ngram_size=2, sequence_bias=[[[p[1]], -2.0]], bad_words_ids=[[p[0]], [p[2], p[3]]]
        ),
        idle=["bad_words_ids", "no_repeat_ngram_size"],
    )
    yield contrastive("min_new_tokens", [6, 4], lambda p, _: dict(eos_token_id=p[0:8], min_new_tokens=6, max_new_tokens=20))
    yield contrastive("suppress_tokens", [6], lambda p, _: dict(suppress_tokens=[p[0], p[2]], begin_suppress_tokens=[p[1]]), idle=["begin_suppress_tokens"])
    yield contrastive("renormalize_logits", [6], dict(renormalize_logits=True, repetition_penalty=1.2), idle=["renormalize_logits"])


def dola():
    def dola(name, rows, own={}, **more):
        return mode(f"dola_{name}", rows, own, dict(dola_layers=[0, 1]), **more)

    yield dola("low", [7, 4], dict(dola_layers="low"))
    yield dola("high", [7, 4], dict(dola_layers="high"))
    yield dola("embeddings", [7, 4], dict(dola_layers=[0]))
    yield dola("list", [7])
    yield dola("batch", [3, 17, 1, 9])
    yield dola("list_with_the_last_layer", [6], dict(dola_layers=[1, 2, 3, 8]))
    yield dola("long", [4], dict(max_new_tokens=40))
    yield dola("repetition_penalty", [9, 5], dict(repetition_penalty=1.2))
    yield dola("eos", [6, 3], lambda p, _: dict(eos_token_id=p[0:8], max_new_tokens=24))
    yield dola(
        "processed",
        [9, 6],
        lambda p, _: dict(repetition_penalty=1.3, sequence_bias=[[[p[1]], -3.0]], no_repeat_ngram_size=2),
        idle=["sequence_bias", "no_repeat_ngram_size"],
    )
    yield dola("use_cache_false", [7], dict(use_cache=False), idle=["use_cache"])
    yield dola("sample", [6, 9], dict(max_new_tokens=1, do_sample=True, temperature=1.3, top_k=5), idle=["do_sample"])


def guidance():
    def guided(name, rows, own={}, **more):
        return mode(f"guidance_{name}", rows, own, dict(guidance_scale=1.5), **more)

    # What the prompt is led away from is no field of the file: search.py hands it to generate().
    negative = lambda count: lambda p, _: dict(negative_prompt_ids=(p * 3)[2 : 2 + count])
    with_negative = lambda count, **own: lambda p, prompt: negative(count)(p, prompt) | own

    yield guided("plain", [7])
    yield guided("batch", [3, 17, 1, 9])
    yield guided("strong", [6, 4], dict(guidance_scale=4.0))
    yield guided("half", [6, 4], dict(guidance_scale=0.5))
    yield guided("none", [6, 4], dict(guidance_scale=0.0))
    yield guided("towards", [6], dict(guidance_scale=-0.5))
    yield guided("negative", [7, 4, 12], negative(5))
    yield guided("negative_of_one", [6, 3], with_negative(1, guidance_scale=2.0))
    yield guided("negative_long", [4, 9], with_negative(29, guidance_scale=3.0))
    yield guided("negative_half", [4, 9], with_negative(6, guidance_scale=0.3))
    yield guided("use_cache_false", [5, 9], with_negative(4, use_cache=False), idle=["use_cache"])
    yield guided("eos", [6, 3], lambda p, prompt: negative(4)(p, prompt) | dict(eos_token_id=p[0:7], max_new_tokens=20))
    yield guided(
        "processed",
        [9, 6],
        lambda p, prompt: negative(4)(p, prompt)
        | dict(repetition_penalty=1.3, sequence_bias=[[[p[1]], -2.0]], no_repeat_ngram_size=2, renormalize_logits=True),
        idle=["sequence_bias", "no_repeat_ngram_size", "renormalize_logits"],
    )
    yield guided("remove_invalid_values", [6], dict(remove_invalid_values=True, suppress_tokens=[5, 6, 7]), idle=["remove_invalid_values", "suppress_tokens"])
    yield guided("sample", [6, 9], dict(max_new_tokens=1, do_sample=True, temperature=0.8, top_k=7), idle=["do_sample"])
    yield guided("sample_negative", [6, 9], with_negative(5, max_new_tokens=1, do_sample=True, top_p=0.8, top_k=0), idle=["do_sample", "top_k"])
