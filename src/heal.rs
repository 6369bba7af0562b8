//! Token healing: the last token of a prompt may become a longer one, so that a prompt can end within a word.

use crate::{
    config::GenerationConfig,
    error::Result,
    logits::pick,
    plan::{Plan, Seeds},
    run::{Run, Setting},
    text::Tokenizer,
};

/// Added to the scores of tokens that begin as the last token of the prompt, and a little more to that of the token itself.
const BIAS: f64 = 10.0;
const OWN: f64 = 11.0;

/// A prompt whose last token was chosen anew.
pub(crate) struct Healed {
    pub ids: Vec<u32>,
    /// What this added to the prompt's text.
    pub head: String,
}

/// Heals the call's prompt number `index`: its text without the white space at its ends is tokenised again, and one token takes the
/// place of the last one, generated as the model's own config says.
// HF: the outcome is the reference's, id for id, its oddities included: the beginning-of-sequence token becomes padding, which
// the healing does not see and the generation after it does, and a tokenizer without a token " " finds nothing to extend a
// token by that begins with a space.
pub(crate) fn heal(setting: &Setting, own: &GenerationConfig, call: &Plan, prompt: &[u32], index: usize) -> Result<Healed> {
    let Some(tokenizer) = &setting.tokenizer else { return Ok(Healed { ids: prompt.to_vec(), head: String::new() }) };
    let before = tokenizer.decode(prompt, true)?;
    let mut ids = tokenizer.encode(before.trim(), true)?;
    let (bos, pad) = (tokenizer.bos(), tokenizer.pad());
    if let (Some(bos), Some(pad)) = (bos, pad) {
        ids.iter_mut().filter(|id| **id == bos).for_each(|id| *id = pad);
    }
    if let Some((&tail, rest)) = ids.split_last()
        && ids.iter().any(|&id| Some(id) != pad)
    {
        let mut rest = rest.to_vec();
        // A prompt of one token goes on from the beginning of a sequence.
        if let (1, Some(last), Some(bos)) = (ids.iter().filter(|&&id| Some(id) != pad).count(), rest.last_mut(), bos) {
            *last = bos;
        }
        if let Some(token) = choose(setting, own, call, tokenizer, &rest, tail, index)? {
            ids = rest;
            ids.push(token);
        }
    }
    let after = tokenizer.decode(&ids, true)?;
    let head = after.strip_prefix(before.trim()).unwrap_or_default().to_owned();
    Ok(Healed { ids, head })
}

/// What `tail` becomes after `rest`, if there is a choice.
fn choose(
    setting: &Setting,
    own: &GenerationConfig,
    call: &Plan,
    tokenizer: &Tokenizer,
    rest: &[u32],
    tail: u32,
    index: usize,
) -> Result<Option<u32>> {
    let candidates = candidates(tokenizer, tail)?;
    let hidden = tokenizer.pad().filter(|pad| !call.eos.contains(pad));
    let seen: Vec<u32> = rest.iter().copied().filter(|&id| Some(id) != hidden).collect();
    if candidates.len() < 2 || seen.is_empty() {
        return Ok(None);
    }
    let bias = |id: u32| (vec![id], if id == tail { OWN } else { BIAS });
    let mut config = GenerationConfig::new().max_new_tokens(1).sequence_bias(candidates.into_iter().map(bias).collect::<Vec<_>>());
    config.seed = Some(match &call.seeds {
        Seeds::One(seed) => pick::row_seed(*seed, index as u64),
        Seeds::Each(seeds) => seeds.get(index).copied().unwrap_or_default(),
    });
    config.cancel.clone_from(&call.cancel);
    let plan = Plan::new(&config, own, setting.model.info(), Some(tokenizer))?;
    let mut run = Run::new(setting.clone(), plan, vec![seen])?;
    while run.step(None)? {}
    Ok(run.output()?.tokens().first().copied())
}

/// The tokens that begin as this one does, itself among them.
fn candidates(tokenizer: &Tokenizer, tail: u32) -> Result<Vec<u32>> {
    let text = tokenizer.decode(&[tail], false)?;
    let space = tokenizer.id(" ").or(tokenizer.unk()).and_then(|id| tokenizer.token(id)).and_then(|token| token.chars().next());
    let text = match space {
        Some(space) => text.replace(' ', space.encode_utf8(&mut [0; 4])),
        None => text,
    };
    let found = tokenizer.extensions(&text);
    match tokenizer.token(tail) {
        // HF: an error there, as with tokens that decode without the space that they begin with.
        Some(token) if !found.is_empty() && !found.contains(&tail) => Ok(tokenizer.extensions(&token)),
        _ => Ok(found),
    }
}
