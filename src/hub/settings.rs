//! Where the hub and its cache are, and who asks: what the caller set, and else what huggingface_hub's environment variables say.

use super::{Options, Repo, Token, error};
use crate::error::Result;
use std::{path::PathBuf, time::Duration};

/// All that a download depends on.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    /// Without a slash at its end.
    pub endpoint: String,
    /// The folder of all repositories' caches.
    pub cache: PathBuf,
    pub revision: String,
    pub token: Option<Token>,
    pub offline: bool,
    pub limits: Limits,
}

/// How long a download waits.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    /// For a connection.
    pub connect: Duration,
    /// For the next bytes.
    pub stall: Duration,
    /// For another process that downloads the same file, as long as its file does not grow.
    pub lock: Duration,
    /// Before the second try; doubled for each further one.
    pub pause: Duration,
    /// Requests in a row that bring nothing.
    pub tries: u32,
}

impl Default for Limits {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { connect: seconds(10), stall: seconds(30), lock: seconds(300), pause: seconds(1), tries: 3 }
    }
}

impl Settings {
    /// HF: the variables, their order and their defaults are huggingface_hub's; one that is empty counts as unset.
    pub fn new(repo: &Repo, options: &Options, env: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let var = |name: &str| env(name).filter(|value| !value.trim().is_empty());
        let flag = |name: &str| var(name).map(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str()));
        let user = || var(if cfg!(windows) { "USERPROFILE" } else { "HOME" }).map(PathBuf::from);
        let path = |value: String| match value.strip_prefix("~/").zip(user()) {
            Some((rest, user)) => user.join(rest),
            None => PathBuf::from(value),
        };
        let home = || {
            var("HF_HOME")
                .map(path)
                .or_else(|| Some(var("XDG_CACHE_HOME").map(path).or_else(|| Some(user()?.join(".cache")))?.join("huggingface")))
        };

        let revisions = [&options.revision, &repo.revision].map(|revision| revision.as_deref());
        let revision = match revisions {
            [Some(one), Some(other)] if one != other => {
                return Err(error(repo, format!("revision {one:?} was set and the name says {other:?}; one of them is accepted")));
            }
            [one, other] => one.or(other).unwrap_or("main").to_owned(),
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./+".contains(c);
        if !super::pick::is_inside(&revision) || !revision.chars().all(plain) {
            return Err(error(repo, format!("revision {revision:?} is none; a branch, a tag or a commit is accepted")));
        }
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into()).trim_end_matches('/').to_owned();
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return Err(error(
                repo,
                format!("HF_ENDPOINT = {endpoint}: an address that begins with https:// or http:// would be accepted"),
            ));
        }
        let cache = options.cache.clone().or_else(|| var("HF_HUB_CACHE").or_else(|| var("HUGGINGFACE_HUB_CACHE")).map(path));
        let Some(cache) = cache.or_else(|| Some(home()?.join("hub"))) else {
            return Err(error(repo, "there is no home folder for the cache: set HF_HOME, or the builder's cache_folder"));
        };

        let file = || var("HF_TOKEN_PATH").map(path).or_else(|| Some(home()?.join("token")));
        let saved = || Some(std::fs::read_to_string(file()?).ok()?.trim().to_owned()).filter(|token| !token.is_empty());
        let implicit = || match flag("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            Some(true) => None,
            _ => var("HF_TOKEN").or_else(|| var("HUGGING_FACE_HUB_TOKEN")).map(|token| token.trim().to_owned()).or_else(saved),
        };
        let token = options.token.clone().or_else(|| implicit().map(Token));
        let offline = options.offline.or_else(|| flag("HF_HUB_OFFLINE").or_else(|| flag("TRANSFORMERS_OFFLINE"))).unwrap_or(false);
        let mut limits = Limits::default();
        if let Some(seconds) = var("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|value| value.parse().ok()).filter(|&seconds| seconds > 0) {
            limits.stall = Duration::from_secs(seconds);
        }
        Ok(Self { endpoint, cache, revision, token, offline, limits })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::path::Path;

    fn repo(name: &str) -> Repo {
        Repo::parse(Path::new(name)).unwrap()
    }

    fn settings(options: &Options, env: &[(&str, &str)]) -> Result<Settings> {
        let var = |name: &str| env.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string());
        Settings::new(&repo("owner/name"), options, &var)
    }

    fn cache(env: &[(&str, &str)]) -> PathBuf {
        settings(&Options::default(), env).unwrap().cache
    }

    #[cfg(unix)]
    #[test]
    fn the_cache_is_where_huggingface_hub_has_it() {
        let home = ("HOME", "/home/me");
        assert_eq!(cache(&[home]), Path::new("/home/me/.cache/huggingface/hub"));
        assert_eq!(cache(&[home, ("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        assert_eq!(cache(&[home, ("XDG_CACHE_HOME", "/x"), ("HF_HOME", "~/hf")]), Path::new("/home/me/hf/hub"));
        assert_eq!(cache(&[("HF_HOME", "/hf"), ("HUGGINGFACE_HUB_CACHE", "/old")]), Path::new("/old"));
        assert_eq!(cache(&[("HF_HOME", "/hf"), ("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "/new")]), Path::new("/new"));
        let options = Options { cache: Some("/mine".into()), ..Options::default() };
        assert_eq!(settings(&options, &[("HF_HUB_CACHE", "/new")]).unwrap().cache, Path::new("/mine"));
    }

    #[test]
    fn without_a_home_the_error_names_the_variable() {
        let error = settings(&Options::default(), &[("HOME", "")]).unwrap_err();
        assert_eq!((error.kind(), error.to_string().contains("set HF_HOME")), ("hub", true), "{error}");
    }

    #[test]
    fn tokens_come_from_the_caller_then_the_environment_then_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let home = ("HF_HOME", folder.path().to_str().unwrap());
        let token = |options: &Options, env: &[_]| settings(options, env).unwrap().token.map(|token| token.0);
        let none = Options::default();
        assert_eq!(token(&none, &[home]), None);
        std::fs::write(folder.path().join("token"), "hf_file\n").unwrap();
        assert_eq!(token(&none, &[home]).unwrap(), "hf_file");
        assert_eq!(token(&none, &[home, ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
        assert_eq!(token(&none, &[home, ("HUGGING_FACE_HUB_TOKEN", "hf_old")]).unwrap(), "hf_old");
        assert_eq!(token(&none, &[home, ("HUGGING_FACE_HUB_TOKEN", "hf_old"), ("HF_TOKEN", "hf_env")]).unwrap(), "hf_env");
        let options = Options { token: Some(Token("hf_mine".into())), ..none };
        assert_eq!(token(&options, &[home, ("HF_TOKEN", "hf_env")]).unwrap(), "hf_mine");
        assert!(!format!("{:?}", settings(&options, &[home]).unwrap()).contains("hf_mine"));
    }

    #[test]
    fn endpoint_offline_and_timeout() {
        let home = ("HF_HOME", "/hf");
        let read = |env: &[_]| settings(&Options::default(), &[&[home], env].concat());
        let plain = read(&[]).unwrap();
        assert_eq!((plain.endpoint.as_str(), plain.offline, plain.limits.stall.as_secs()), ("https://huggingface.co", false, 30));
        assert_eq!(read(&[("HF_ENDPOINT", "http://localhost:80//")]).unwrap().endpoint, "http://localhost:80");
        assert!(read(&[("HF_ENDPOINT", "localhost")]).unwrap_err().to_string().contains("HF_ENDPOINT = localhost"));
        for (value, offline) in [("1", true), ("yes", true), ("True", true), ("0", false), ("", false)] {
            assert_eq!(read(&[("HF_HUB_OFFLINE", value)]).unwrap().offline, offline, "{value}");
        }
        assert!(read(&[("TRANSFORMERS_OFFLINE", "1")]).unwrap().offline);
        assert_eq!(read(&[("HF_HUB_DOWNLOAD_TIMEOUT", "7")]).unwrap().limits.stall.as_secs(), 7);
        let online = Options { offline: Some(false), ..Options::default() };
        assert!(!settings(&online, &[home, ("HF_HUB_OFFLINE", "1")]).unwrap().offline);
    }

    #[test]
    fn revisions() {
        let read = |name: &str, revision: Option<&str>| {
            let options = Options { revision: revision.map(str::to_owned), ..Options::default() };
            Settings::new(&repo(name), &options, &|name| (name == "HF_HOME").then(|| "/hf".into())).map(|settings| settings.revision)
        };
        assert_eq!(read("a/b", None).unwrap(), "main");
        assert_eq!(read("a/b@refs/pr/1", None).unwrap(), "refs/pr/1");
        assert_eq!(read("a/b@v1", Some("v1")).unwrap(), "v1");
        assert!(read("a/b@v1", Some("v2")).unwrap_err().to_string().contains(r#"revision "v2" was set and the name says "v1""#));
        for revision in ["", "../x", "/x", "a b", "a?b", "a/../../b"] {
            assert!(read("a/b", Some(revision)).is_err(), "{revision}");
        }
    }
}
