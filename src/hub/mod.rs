//! Checkpoints by their names on the Hugging Face hub: found in the cache that huggingface_hub keeps, or downloaded into it.
//!
//! hf-hub is not used. Its blocking client (0.5) has no timeouts, checks neither lengths nor hashes, appends to a partial
//! file whatever the server answers, panics without a home folder, and its progress cannot cancel; version 1.0 needs tokio
//! and a cryptography that is built with cmake. What remains of the work is here, over ureq.

// Without the feature only names are parsed, to say what is missing.
#![cfg_attr(not(feature = "hub"), allow(dead_code))]

#[cfg(feature = "hub")]
mod cache;
#[cfg(feature = "hub")]
mod client;
#[cfg(feature = "hub")]
mod fetch;
#[cfg(feature = "hub")]
mod pick;
#[cfg(all(test, feature = "hub"))]
mod server;
#[cfg(feature = "hub")]
mod settings;
#[cfg(all(test, feature = "hub"))]
mod tests;

use crate::{
    error::{Error, Result},
    progress::OnProgress,
};
use std::{
    fmt,
    path::{Path, PathBuf},
};
#[cfg(feature = "hub")]
use {
    crate::progress::Stage,
    cache::Cache,
    client::{Client, Remote},
    settings::Settings,
};

/// A repository of a model: `owner/name`, or `owner/name@revision`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Repo {
    id: String,
    revision: Option<String>,
}

/// What a caller may set about downloads; the environment says the rest.
#[derive(Debug, Clone, Default)]
pub(crate) struct Options {
    pub revision: Option<String>,
    pub token: Option<Token>,
    pub offline: Option<bool>,
    pub cache: Option<PathBuf>,
}

/// An access token, which no message shows.
#[derive(Clone)]
pub(crate) struct Token(pub String);

impl Repo {
    /// None where the name can be no repository's, but only a folder's.
    pub fn parse(name: &Path) -> Option<Self> {
        let name = name.to_str()?;
        let (id, revision) = name.split_once('@').map_or((name, None), |(id, revision)| (id, Some(revision)));
        let part = |part: &str| {
            (1..=96).contains(&part.len())
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
                && !part.starts_with(['-', '.'])
                && !part.ends_with(['-', '.'])
                && !part.contains("--")
                && !part.contains("..")
        };
        let (owner, name) = id.split_once('/')?;
        (part(owner) && part(name)).then(|| Self { id: id.to_owned(), revision: revision.map(str::to_owned) })
    }
}

impl fmt::Display for Repo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

/// The folder of a repository's files: what the hub has now, or what the cache has if the hub is out of reach.
#[cfg(feature = "hub")]
pub(crate) fn folder(repo: &Repo, options: &Options, progress: Option<&OnProgress>) -> Result<PathBuf> {
    let env = |name: &str| std::env::var(name).ok();
    let settings = Settings::new(repo, options, &env)?;
    snapshot(repo, &settings, progress)
}

/// This build has no hub.
#[cfg(not(feature = "hub"))]
pub(crate) fn folder(repo: &Repo, _: &Options, _: Option<&OnProgress>) -> Result<PathBuf> {
    Err(Error::Unsupported(format!("{repo} is no folder, and to download a repository of that name the feature `hub` is needed")))
}

#[cfg(feature = "hub")]
fn snapshot(repo: &Repo, settings: &Settings, progress: Option<&OnProgress>) -> Result<PathBuf> {
    let cache = Cache::new(&settings.cache, &repo.id);
    if settings.offline {
        return cached(repo, settings, &cache);
    }
    let client = Client::new(repo, settings);
    let listing = match client.list() {
        Ok(listing) => listing,
        // HF: a hub that is down, or no longer lets us in, does not keep anybody from the files they already have.
        Err(fault) if fault.leaves_cache() => return cached(repo, settings, &cache).map_err(|_| client.error(fault, None)),
        Err(fault) => return Err(client.error(fault, None)),
    };
    let folder = cache.snapshot(&listing.commit);
    let mut names = pick::files(listing.files.keys()).map_err(|reason| error(repo, reason))?;
    let size = |name: &str| listing.files.get(name).copied().flatten();
    let head = |name: &str| client.head(&listing.commit, name).map_err(|fault| client.error(fault, Some(name)));
    let fetch = |remote: &Remote, report: &mut dyn FnMut(u64) -> Result<()>| {
        fetch::fetch(&client, &cache, &listing.commit, remote, report).map_err(|fault| client.error(fault, Some(&remote.name)))
    };
    // The index says which shards there are, so it comes before all that is counted.
    if let Some(index) = names.iter().find(|name| pick::is_index(name)) {
        if !cache.has(&listing.commit, index, size(index)) {
            fetch(&head(index)?, &mut |_| Ok(()))?;
        }
        let shards = pick::shards(&folder.join(index))?;
        if let Some(missing) = shards.iter().find(|shard| !listing.files.contains_key(*shard)) {
            return Err(error(repo, format!("{index} lists {missing}, which the repository does not have")));
        }
        names.extend(shards);
    }

    let missing: Vec<_> = names.iter().filter(|name| !cache.has(&listing.commit, name, size(name))).collect();
    let remotes = missing.into_iter().map(|name| head(name)).collect::<Result<Vec<_>>>()?;
    let total = remotes.iter().fold(0u64, |total, remote| total.saturating_add(remote.size));
    let mut before = 0u64;
    for remote in &remotes {
        let done = |done| progress.map_or(Ok(()), |progress| progress.report(Stage::Download, before.saturating_add(done), total));
        fetch(remote, &mut { done })?;
        before = before.saturating_add(remote.size);
    }
    // A revision moves to a commit only when all of its files are there: who is offline never finds half of them.
    match cache.point(&settings.revision, &listing.commit) {
        // A cache that cannot be written to serves what it has.
        Err(failed) if !remotes.is_empty() => Err(failed),
        _ => Ok(folder),
    }
}

/// The folder of what an earlier download left, if it is whole.
#[cfg(feature = "hub")]
fn cached(repo: &Repo, settings: &Settings, cache: &Cache) -> Result<PathBuf> {
    let lacks = |what: &str| {
        let (revision, cache) = (&settings.revision, settings.cache.display());
        error(repo, format!("offline, and {what}revision {revision} is not in the cache {cache}: download it once with the network on"))
    };
    let folder = cache.commit(&settings.revision).map(|commit| cache.snapshot(&commit)).ok_or_else(|| lacks(""))?;
    let names: Vec<_> =
        pick::WEIGHTS.iter().chain([&pick::CONFIG]).filter(|name| folder.join(name).is_file()).map(|name| name.to_string()).collect();
    let names = pick::files(names.iter()).map_err(|_| lacks("config.json or the weights of "))?;
    if let Some(index) = names.iter().find(|name| pick::is_index(name)) {
        let shards = pick::shards(&folder.join(index))?;
        if let Some(missing) = shards.iter().find(|shard| !folder.join(shard).is_file()) {
            return Err(lacks(&format!("{missing} of ")));
        }
    }
    Ok(folder)
}

#[cfg(feature = "hub")]
fn error(repo: &Repo, reason: impl Into<String>) -> Error {
    Error::Hub { repo: repo.to_string(), reason: reason.into() }
}
