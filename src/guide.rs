//! The guide: which strategy, which setting, and how things are done. Every Rust example in it runs as a test.
//!
//! | to | read |
//! | --- | --- |
//! | choose between greedy search, sampling, beams and the rest | [`strategies`] |
//! | look a field of the config up | [`parameters`] |
//! | do a thing: JSON, classification, chat, many prompts, ... | [`recipes`] |
//! | get from what is wrong to the setting that helps | [`symptoms`] |
//! | show text as it appears, and end calls | [`streaming`] |
//! | bring a model, a processor or a stopping criterion | [`extending`] |
//! | load checkpoints, with limits and without a network | [`loading`] |
//! | compare with transformers | [`differences`] |

// For the links of the pages.
#[cfg(doc)]
#[allow(unused_imports)]
use super::*;

#[doc = include_str!("../docs/guide/strategies.md")]
pub mod strategies {}

#[doc = include_str!("../docs/guide/parameters.md")]
pub mod parameters {}

#[doc = include_str!("../docs/guide/recipes.md")]
pub mod recipes {}

#[doc = include_str!("../docs/guide/symptoms.md")]
pub mod symptoms {}

#[doc = include_str!("../docs/guide/streaming.md")]
pub mod streaming {}

#[doc = include_str!("../docs/guide/extending.md")]
pub mod extending {}

#[doc = include_str!("../docs/guide/loading.md")]
pub mod loading {}

#[doc = include_str!("../docs/guide/differences.md")]
pub mod differences {}

#[cfg(test)]
mod tests {
    use crate::{Error, GenerationConfig, ModelInfo, Plan};
    use serde_json::{Map, Value, json};
    use std::{collections::BTreeSet, fs, path::Path};

    const PARAMETERS: &str = include_str!("../docs/guide/parameters.md");

    /// The cells of each row of the page's tables that have so many columns, without their code marks.
    fn rows(columns: usize) -> Vec<Vec<String>> {
        let cells = |line: &str| line.trim_matches('|').split(" | ").map(|cell| cell.trim().trim_matches('`').to_owned()).collect();
        let rows = PARAMETERS.lines().filter(|line| line.starts_with("| `")).map(cells);
        rows.filter(|row: &Vec<String>| row.len() == columns).collect()
    }

    #[test]
    fn every_field_is_described_with_its_type_and_default() {
        let described = rows(5);
        let named: BTreeSet<_> = described.iter().map(|row| (row[0].as_str(), row[1].as_str())).collect();
        assert_eq!(named, GenerationConfig::FIELDS.iter().copied().collect::<BTreeSet<_>>());
        assert_eq!(named.len(), described.len(), "a field is described twice");
        let defaults = GenerationConfig::defaults().entries();
        for row in &described {
            let default = defaults.get(&row[0]).map_or("unset".to_owned(), Value::to_string);
            assert_eq!(row[2], default, "{}", row[0]);
        }
    }

    #[test]
    fn what_is_no_key_of_the_file_is_described_too() {
        let fields = include_str!("config/mod.rs").lines().filter_map(|line| line.strip_prefix("            pub ")?.split_once(": "));
        let fields: Vec<_> = fields.map(|(name, _)| name).filter(|name| !name.contains('(')).collect();
        assert!(fields.contains(&"cancel"), "the struct was not found");
        assert_eq!(rows(3).iter().map(|row| row[0].as_str()).collect::<Vec<_>>(), fields);
    }

    /// What an error says about a value below every range is what the page says.
    #[test]
    fn ranges_are_those_of_the_errors() {
        let modes = [
            json!({"do_sample": true}),
            json!({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}),
            json!({"penalty_alpha": 0.6, "top_k": 4}),
            json!({"prompt_lookup_num_tokens": 3}),
        ];
        let mut known = BTreeSet::new();
        for row in rows(5).iter().filter(|row| ["i64", "f64"].contains(&row[1].as_str())) {
            for mode in &modes {
                let mut config: Map<String, Value> = mode.as_object().unwrap().clone();
                config.insert(row[0].clone(), json!(-1));
                let Ok(config) = GenerationConfig::from_json(&Value::Object(config)) else { continue };
                let call = if config.eos_token_id.is_some() { config } else { config.eos_token_id(2) };
                let Err(Error::Config(problems)) = Plan::new(&call, &GenerationConfig::new(), &ModelInfo::new("test", 9), None) else {
                    continue;
                };
                for problem in problems.iter().filter(|problem| problem.field == row[0] && problem.value == "-1") {
                    let accepted = row[3].split(", a divisor").next().unwrap();
                    assert!(problem.reason.contains(accepted), "{problem}; the page says {accepted}");
                    known.insert(row[0].clone());
                }
            }
        }
        assert!(known.len() > 30, "{known:?}");
    }

    /// Each file with a mark is named by the page, and each file it names has one.
    #[test]
    fn differences_name_the_places_that_are_marked() {
        fn marked(folder: &Path, found: &mut BTreeSet<String>) {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    marked(&path, found);
                } else if fs::read_to_string(&path).unwrap().contains(concat!("HF", ":")) {
                    found.insert(path.to_str().unwrap().replace('\\', "/"));
                }
            }
        }
        let mut places = BTreeSet::new();
        marked(Path::new("src"), &mut places);
        let page = include_str!("../docs/guide/differences.md");
        let named = page.split('`').filter(|text| text.starts_with("src/") && text.ends_with(".rs")).map(str::to_owned);
        assert_eq!(named.collect::<BTreeSet<_>>(), places);
    }
}
