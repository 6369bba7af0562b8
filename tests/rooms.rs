//! The rooms of ARCHITECTURE.md: a lower one never imports a higher one.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The rooms, lowest first. Those of one floor may import each other.
const FLOORS: [&[&str]; 11] = [
    &["error", "progress"],
    &["device", "model", "cache", "logits", "text", "trace", "output", "hub", "kernels"],
    &["stop", "constrain", "models", "foreign"],
    &["config"],
    &["plan", "memory"],
    &["rows"],
    &["search", "prefix"],
    &["run", "score"],
    &["heal"],
    &["generator"],
    &["chat", "guide"],
];

#[test]
fn no_room_imports_a_higher_one() {
    let files = sources();
    assert!(files.len() > 10, "found only {} files in src", files.len());
    let exports = exports(&fs::read_to_string(root().join("lib.rs")).unwrap());
    let wrong: Vec<String> = files
        .iter()
        .flat_map(|(path, source)| {
            let depth = path.components().count() - usize::from(path.ends_with("mod.rs"));
            wrong_arrows(room_of(path), depth, source, &exports).into_iter().map(|arrow| format!("{}: {arrow}", path.display()))
        })
        .collect();
    assert!(wrong.is_empty(), "wrong arrows:\n{}", wrong.join("\n"));
}

#[test]
fn unsafe_code_stays_in_the_kernels_and_the_mmap() {
    let offenders: Vec<_> = sources()
        .into_iter()
        .filter(|(path, source)| words(&code(source)).any(|word| word == "unsafe") && !may_be_unsafe(path))
        .map(|(path, _)| path)
        .collect();
    assert!(offenders.is_empty(), "unsafe outside src/kernels and src/models/weights.rs: {offenders:?}");
}

#[test]
fn the_check_can_fail() {
    let exports = exports("pub use run::{Stream, Run as Call};\npub use error::Error;");
    let wrong = |room, depth, source| wrong_arrows(room, depth, source, &exports);
    assert_eq!(wrong("logits", 2, "use crate::plan::Plan;"), ["logits imports plan"]);
    assert_eq!(wrong("plan", 1, "use crate::{error::Result, search::{self, Turn}, text};"), ["plan imports search"]);
    assert_eq!(wrong("rows", 1, "fn f() -> crate::run::Setting { todo!() }"), ["rows imports run"]);
    assert_eq!(wrong("stop", 1, "use super::generator::Generator;"), ["stop imports generator"]);
    assert_eq!(wrong("search", 2, "use super::super::run::Run;"), ["search imports run"]);
    assert_eq!(wrong("plan", 1, "use crate::{Stream, Error};"), ["plan imports run"]);
    assert_eq!(wrong("plan", 1, "use crate::Call;"), ["plan imports run"]);
    assert_eq!(wrong("plan", 1, "use crate::attic::Box;"), ["plan imports attic, which is no room"]);
    assert_eq!(wrong("attic", 1, ""), ["attic is no room"]);

    let right =
        "/// [`Run`](crate::run::Run)\n// crate::run\nuse crate::{error::Error, search::Turn};\nconst A: &str = \"crate::generator\";
        pub(crate) fn f<'a>(c: char) -> bool { c == '\"' }\n#[cfg(test)]\nmod tests { use crate::generator::Generator; fn f() {} }";
    assert_eq!(wrong("run", 1, right), [""; 0]);
    assert_eq!(wrong("search", 2, "use super::{Search, Turn};"), [""; 0]);
    assert!(words(&code("fn f() { unsafe { g() } }")).any(|word| word == "unsafe"));
    assert!(!words(&code("#![deny(unsafe_op_in_unsafe_fn)] // unsafe")).any(|word| word == "unsafe"));
}

/// A message for each path in `source` that leads from `room` to a higher room. `depth` is the number of modules around it.
fn wrong_arrows(room: &str, depth: usize, source: &str, exports: &[(String, String)]) -> Vec<String> {
    let Some(own) = floor(room) else {
        return vec![format!("{room} is no room")];
    };
    let mut wrong = Vec::new();
    for name in imports(&code(source), depth) {
        let target = exports.iter().find(|(item, _)| *item == name).map_or(name.as_str(), |(_, room)| room);
        match floor(target) {
            Some(other) if other > own => wrong.push(format!("{room} imports {target}")),
            Some(_) => {}
            None => wrong.push(format!("{room} imports {target}, which is no room")),
        }
    }
    wrong
}

fn floor(room: &str) -> Option<usize> {
    FLOORS.iter().position(|rooms| rooms.contains(&room))
}

fn may_be_unsafe(path: &Path) -> bool {
    path.starts_with("kernels") || path == Path::new("models/weights.rs")
}

fn room_of(path: &Path) -> &str {
    path.components().next().and_then(|first| first.as_os_str().to_str()).unwrap().trim_end_matches(".rs")
}

fn root() -> PathBuf {
    PathBuf::from("src")
}

/// The files under src, by their path in it, without lib.rs (which may see everything) and tests.
fn sources() -> Vec<(PathBuf, String)> {
    let (mut files, mut folders) = (Vec::new(), vec![root()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root()).unwrap().to_owned();
            if path.is_dir() {
                folders.push(path);
            } else if name.extension().is_some_and(|extension| extension == "rs")
                && name != Path::new("lib.rs")
                && !name.ends_with("tests.rs")
            {
                files.push((name, fs::read_to_string(path).unwrap()));
            }
        }
    }
    files
}

/// What lib.rs exports at the top, and from which room.
fn exports(lib: &str) -> Vec<(String, String)> {
    let mut exports = Vec::new();
    for statement in code(lib).split(';') {
        if let Some((_, path)) = statement.split_once("pub use ")
            && let Some((room, items)) = path.trim().split_once("::")
        {
            for item in items.trim_matches(['{', '}']).split(',') {
                let name = item.rsplit(' ').find(|word| !word.is_empty()).unwrap_or_default();
                exports.push((name.trim().to_owned(), room.to_owned()));
            }
        }
    }
    exports
}

/// The first name of each path that starts at the crate's root.
fn imports(code: &str, depth: usize) -> Vec<String> {
    let mut names = Vec::new();
    let up = "super::".repeat(depth);
    for (start, always) in [("crate::", true), (up.as_str(), false)] {
        for (at, _) in code.match_indices(start) {
            if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$' || c == ':') {
                continue;
            }
            let found = first_names(&code[at + start.len()..]);
            // Inside an inline module, `super` is not the root: there only the name of a room tells.
            names.extend(found.into_iter().filter(|name| always || floor(name).is_some()));
        }
    }
    names
}

/// The first name of a path, or of each path of a `{..}` group.
fn first_names(path: &str) -> Vec<String> {
    let name = |text: &str| words(text).next().unwrap_or_default().to_owned();
    let Some(group) = path.strip_prefix('{') else {
        return vec![name(path)];
    };
    let (mut names, mut depth, mut from) = (Vec::new(), 0, 0);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                names.push(name(&group[from..at]));
                from = at + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    names.retain(|name| !name.is_empty() && name != "self");
    names
}

fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

/// `source` without comments, string literals and test modules.
fn code(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(c) = rest.chars().next() {
        let skip = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |at| at + 2)
        } else if rest.starts_with("r\"") || rest.starts_with("r#") {
            raw_string(rest)
        } else if c == '"' {
            string(rest)
        } else if c == '\'' {
            character(rest)
        } else {
            0
        };
        if skip == 0 {
            out.push(c);
            rest = &rest[c.len_utf8()..];
        } else {
            rest = &rest[skip..];
        }
    }
    without_tests(&out)
}

fn string(text: &str) -> usize {
    let mut escaped = true; // The opening quote.
    for (at, c) in text.char_indices() {
        match c {
            '"' if !escaped => return at + 1,
            '\\' => escaped = !escaped,
            _ => escaped = false,
        }
    }
    text.len()
}

// Zero for a raw identifier.
fn raw_string(text: &str) -> usize {
    let hashes = text[1..].chars().take_while(|&c| c == '#').count();
    if !text[1 + hashes..].starts_with('"') {
        return 0;
    }
    let end = format!("\"{}", "#".repeat(hashes));
    let start = hashes + 2;
    text[start..].find(&end).map_or(text.len(), |at| start + at + end.len())
}

// Zero for a lifetime.
fn character(text: &str) -> usize {
    let mut chars = text.char_indices().skip(1);
    match (chars.next(), chars.next()) {
        (Some((_, '\\')), _) => text[3..].find('\'').map_or(0, |at| at + 4),
        (_, Some((at, '\''))) => at + 1,
        _ => 0,
    }
}

fn without_tests(code: &str) -> String {
    let mut out = String::with_capacity(code.len());
    let mut rest = code;
    while let Some(at) = ["#[cfg(test)]", "#[cfg(all(test"].iter().filter_map(|start| rest.find(start)).min() {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let end = rest.find(['{', ';']).unwrap_or(rest.len());
        let mut depth = 0;
        let close = rest[end..].find(|c| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            depth == 0
        });
        rest = &rest[close.map_or(rest.len(), |at| end + at + 1)..];
    }
    out + rest
}
