//! Token healing on the storyteller: the ids of transformers 5.23.0, and texts that go on from the prompt's.

use candle_generate::{GenerationConfig, Generator};
use std::{path::Path, sync::LazyLock};

static STORYTELLER: LazyLock<Generator> = LazyLock::new(|| Generator::from_pretrained(Path::new("examples/models/storyteller")).unwrap());

/// Prompts, what healing adds to them, and eight generated ids: `generate(..., token_healing=True, tokenizer=..., do_sample=False)`.
const CASES: [(&str, &str, [u32; 8]); 10] = [
    ("Once upon a ti", "", [293, 293, 17, 284, 313, 364, 1695, 324]),
    ("The ki", "ss", [294, 265, 367, 901, 294, 265, 367, 901]),
    ("Once upon a time", "", [450, 313, 264, 459, 431, 347, 865, 266]),
    ("The fox went to the", "", [1995, 17, 275, 352, 17, 355, 46, 573]),
    ("An", "", [381, 678, 275, 264, 381, 678, 403, 377]),
    ("T", "here", [313, 737, 264, 920, 459, 431, 347, 264]),
    ("the ", "", [1010, 553, 265, 689, 313, 1355, 285, 302]),
    ("The http://", "", [23, 17, 275, 395, 438, 84, 565, 17]),
    ("There was a king who had three beautif", "", [904, 288, 1546, 17, 275, 265, 768, 463]),
    ("She said: “Go", "od", [553, 282, 315, 6, 1518, 718, 265, 1370]),
];

fn config() -> GenerationConfig {
    GenerationConfig::greedy().max_new_tokens(8).token_healing(true)
}

#[test]
fn ids_are_those_of_the_reference() {
    let tokenizer = STORYTELLER.tokenizer().unwrap();
    let batch = STORYTELLER.generate_batch(CASES.map(|(prompt, ..)| prompt), &config()).unwrap();
    for ((prompt, head, ids), row) in CASES.iter().zip(&batch.sequences) {
        assert_eq!(row.tokens, ids, "{prompt:?}");
        assert!(row.text.starts_with(head), "{prompt:?}: {:?}", row.text);
        assert_eq!(row.full_text, format!("{}{}", prompt.trim(), row.text), "{prompt:?}");
        let generated = tokenizer.decode(&row.tokens, true).unwrap();
        assert_eq!(row.text, format!("{head}{generated}"), "{prompt:?}");
        let encoded = STORYTELLER.encode(*prompt).unwrap();
        let alone = STORYTELLER.generate(encoded, &config()).unwrap();
        assert_eq!((alone.tokens(), alone.text()), (ids.as_slice(), row.text.as_str()), "ids are healed as text is");
    }
}

#[test]
fn a_stream_begins_with_the_healed_part() {
    for (prompt, head, _) in CASES {
        let collected = STORYTELLER.generate(prompt, &config()).unwrap();
        let streamed: String = STORYTELLER.stream(prompt, &config()).unwrap().map(|piece| piece.unwrap().text).collect();
        assert_eq!(streamed, collected.text());
        assert!(streamed.starts_with(head));
    }
}

#[test]
fn healing_needs_a_tokenizer() {
    let llama = Generator::from_pretrained(Path::new("tests/golden/llama")).unwrap();
    let error = llama.generate(vec![5, 6], &config()).unwrap_err();
    assert!(error.kind() == "config" && error.to_string().contains("token_healing"), "{error}");
}
