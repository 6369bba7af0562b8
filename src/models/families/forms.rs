//! What transformers makes of config.json in each of the forms that it is written in, by tests/golden/forms.json.
#![allow(clippy::unwrap_used)]

use super::spec;
use crate::{
    kernels::{Attention, Sight},
    models::{
        fields::Fields,
        rope::Rotation,
        spec::{DecoderSpec, Head, Mlp, Positions},
        tiny,
    },
};
use candle_core::DType;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

const PATH: &str = "tests/golden/forms.json";

/// The file; forms.py says what its fields are.
#[derive(Deserialize)]
struct File {
    shared: BTreeMap<String, Map<String, Value>>,
    families: BTreeMap<String, Family>,
}

#[derive(Deserialize)]
struct Family {
    config: Map<String, Value>,
    is: Map<String, Value>,
    forms: Vec<Forms>,
}

#[derive(Deserialize)]
struct Forms {
    of: Vec<String>,
    set: Option<Map<String, Value>>,
    is: Map<String, Value>,
}

#[test]
fn every_form_is_read_as_the_reference_reads_it() {
    let File { shared, families } = serde_json::from_slice(&std::fs::read(PATH).unwrap()).unwrap();
    let (mut wrong, mut count) = (Vec::new(), 0);
    for (family, Family { config, is: usual, forms }) in &families {
        let mut check = |name: &str, config: Map<String, Value>, is: &Map<String, Value>| {
            count += 1;
            let found = effective(config).unwrap_or_else(|error| json!({"weights": error}));
            for (key, expected) in usual {
                let expected = is.get(key).unwrap_or(expected);
                if !same(&found[key], expected) {
                    wrong.push(format!("{family}, {name}: {key} is {}, not {expected}", found[key]));
                }
            }
        };
        check("base", config.clone(), &Map::new());
        for Forms { of, set, is } in forms {
            for name in of {
                let form = match (set.as_ref().or(shared.get(name)), name.as_str()) {
                    (Some(set), _) => merged(config.clone(), set),
                    (None, "bare") => Map::from_iter([("model_type".to_owned(), json!(family))]),
                    (None, _) => panic!("{name} is not shared"),
                };
                check(name, form, is);
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {count} forms:\n{}", wrong.len(), wrong.join("\n"));
    let named: Vec<&str> = families.keys().map(String::as_str).collect();
    // Those that only decode; the others have no rotary positions, in which the forms differ.
    let encodes =
        |family: &str| spec(&Fields::new(tiny::config(family).as_object().unwrap().clone())).is_ok_and(|spec| spec.encoder.is_some());
    let mut known: Vec<_> = super::FAMILIES.into_iter().map(|(family, _)| family).filter(|family| !encodes(family)).collect();
    known.sort_unstable();
    assert_eq!(named, known);
}

/// The config with the form's fields, without those that it calls absent.
fn merged(mut config: Map<String, Value>, set: &Map<String, Value>) -> Map<String, Value> {
    for (name, value) in set {
        match (config.get_mut(name), value) {
            (_, Value::String(text)) if text == "absent" => drop(config.remove(name)),
            (Some(Value::Object(inner)), Value::Object(more)) => *inner = merged(inner.clone(), more),
            _ => drop(config.insert(name.clone(), value.clone())),
        }
    }
    config
}

/// The reading of a config, as forms.json tells it.
fn effective(config: Map<String, Value>) -> Result<Value, String> {
    let config = Fields::new(config);
    let spec = spec(&config).map_err(|error| error.to_string())?;
    let (first, last) = (&spec.attention[0], &spec.attention[spec.attention.len() - 1]);
    let window = |attention: &Attention| if let Sight::Window(window) = attention.sight { Some(window) } else { None };
    let windows: Vec<_> = spec.attention.iter().map(window).collect();
    let weights: usize = tiny::shapes(&spec).iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    let (Mlp::Plain { activation, .. } | Mlp::Gated { activation, .. } | Mlp::GatedFused { activation, .. }) = spec.mlp;
    let (positions, turns) = match &spec.positions {
        Positions::Learned { len, .. } => (Some(*len), Vec::new()),
        Positions::Alibi { trained } => (*trained, Vec::new()),
        Positions::Rope { trained, layers, .. } => (Some(*trained), layers.iter().map(Option::is_some).collect()),
        Positions::Waves { .. } | Positions::Relative { .. } => return Err("no decoder-only family".into()),
    };
    let dtype = match config.dtype().map_err(|error| error.to_string())? {
        DType::F32 => "float32",
        DType::BF16 => "bfloat16",
        _ => "float16",
    };
    Ok(json!({
        "weights": weights,
        "heads": [spec.attention.len(), first.heads, first.kv_heads, first.head_dim],
        "windows": if windows.iter().all(|window| *window == windows[0]) { json!(windows[0]) } else { json!(windows) },
        "turns": turns,
        "rotations": rotations(&spec),
        "scales": [Some(first.scale), Some(last.scale), spec.embedding_scale, first.softcap, spec.softcap],
        "eps": spec.norm.eps,
        "activation": format!("{activation:?}"),
        "tied": matches!(spec.head, Head::Tied(_)),
        "dtype": dtype,
        "positions": positions,
        "experts": spec.experts.as_ref().map(|experts| json!([experts.layers, experts.top, experts.renormalise])),
    }))
}

fn rotations(spec: &DecoderSpec) -> Vec<Value> {
    let Positions::Rope { rotations, layers, trained } = &spec.positions else { return Vec::new() };
    let at = |rotation: &Rotation, len| {
        let rope = rotation.at(len);
        let place = |index| rope.inv_freq.get(index);
        json!([rope.inv_freq.len(), place(0), place(1.min(rope.inv_freq.len() - 1)), rope.inv_freq.last(), rope.scale])
    };
    let told = |(index, rotation)| {
        let (short, long) = (at(rotation, 1), at(rotation, 3 * trained));
        match layers.contains(&Some(index)) {
            false => Value::Null,
            true if same(&short, &long) => json!([short]),
            true => json!([short, long]),
        }
    };
    rotations.iter().enumerate().map(told).collect()
}

/// Equal up to the digits that the file has. A type that the reference does not know is f32 here.
fn same(found: &Value, expected: &Value) -> bool {
    match (found, expected) {
        (Value::Array(found), Value::Array(expected)) => {
            found.len() == expected.len() && found.iter().zip(expected).all(|(found, expected)| same(found, expected))
        }
        (Value::Number(found), Value::Number(expected)) => {
            let (found, expected) = (found.as_f64().unwrap(), expected.as_f64().unwrap());
            (found - expected).abs() <= 1e-5 * expected.abs()
        }
        (Value::String(found), Value::Null) => found == "float32",
        _ => found == expected,
    }
}
