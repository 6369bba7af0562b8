//! The cache folder in huggingface_hub's layout, so that what either downloads is a hit for the other.
//!
//! ```text
//! models--owner--name/blobs/{etag}                the contents
//! models--owner--name/refs/{revision}             the commit that a branch or a tag was last
//! models--owner--name/snapshots/{commit}/{file}   links to contents
//! .locks/models--owner--name/{etag}.lock          held during a download
//! ```

use super::pick::is_inside;
use crate::error::{Error, Result};
use std::{
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant, SystemTime},
};

/// How often a lock is tried.
const TICK: Duration = Duration::from_millis(50);

/// The cache of one repository.
#[derive(Debug)]
pub(super) struct Cache {
    folder: PathBuf,
    locks: PathBuf,
}

impl Cache {
    pub fn new(cache: &Path, id: &str) -> Self {
        let name = format!("models--{}", id.replace('/', "--"));
        Self { folder: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    /// The folder of a commit's files.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// The content that is called by an etag.
    pub fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// Where that content grows.
    pub fn partial(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// Whether a commit's file is there, in its size where that is known.
    pub fn has(&self, commit: &str, name: &str, size: Option<u64>) -> bool {
        is_file(&self.snapshot(commit).join(name), size)
    }

    /// The commit that a revision is, or was when it was last asked for.
    pub fn commit(&self, revision: &str) -> Option<String> {
        let known = fs::read_to_string(self.folder.join("refs").join(revision)).ok();
        let commit = known.map_or_else(|| revision.to_owned(), |commit| commit.trim().to_owned());
        (is_inside(&commit) && self.snapshot(&commit).is_dir()).then_some(commit)
    }

    /// Notes which commit a revision is.
    pub fn point(&self, revision: &str, commit: &str) -> Result<()> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let path = self.folder.join("refs").join(revision);
        if revision == commit || fs::read_to_string(&path).is_ok_and(|known| known.trim() == commit) {
            return Ok(());
        }
        make_parent(&path)?;
        let mut fresh = path.clone().into_os_string();
        fresh.push(format!(".{}-{}.tmp", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        fs::write(&fresh, commit).and_then(|()| fs::rename(&fresh, &path)).map_err(|error| Error::load(&path, error))
    }

    /// Links a commit's file to its content.
    pub fn link(&self, commit: &str, name: &str, etag: &str, size: u64) -> Result<()> {
        let path = self.snapshot(commit).join(name);
        make_parent(&path)?;
        let up = "../".repeat(2 + Path::new(name).components().count() - 1);
        let linked = symlink(Path::new(&format!("{up}blobs/{etag}")), &path).or_else(|error| {
            if is_file(&path, Some(size)) {
                return Ok(());
            }
            if error.kind() == io::ErrorKind::AlreadyExists {
                // It leads nowhere, or to a file of another length.
                fs::remove_file(&path)?;
                return symlink(Path::new(&format!("{up}blobs/{etag}")), &path);
            }
            // HF: where links are not allowed, the content itself moves into the snapshot.
            fs::rename(self.blob(etag), &path)
        });
        linked.map_err(|error| Error::load(&path, error))
    }

    /// Waits until nobody else downloads a content. A lock saves double work and no more: two that write at once, on a
    /// file system whose locks do not hold, write the same bytes in the same places. So one that fails is no error.
    pub fn lock(&self, etag: &str, patience: Duration, wait: &mut dyn FnMut() -> Result<()>) -> Result<Option<File>> {
        let path = self.locks.join(format!("{etag}.lock"));
        make_parent(&path)?;
        make_parent(&self.blob(etag))?;
        let Ok(file) = OpenOptions::new().write(true).create(true).truncate(false).open(&path) else { return Ok(None) };
        let (mut seen, mut since) = (self.growth(etag), Instant::now());
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                Err(fs::TryLockError::Error(_)) => return Ok(None),
                Err(fs::TryLockError::WouldBlock) => {}
            }
            wait()?;
            thread::sleep(TICK);
            let now = self.growth(etag);
            if now != seen {
                (seen, since) = (now, Instant::now());
            } else if since.elapsed() > patience {
                let reason = format!("another process has held this lock for {} seconds without downloading anything", patience.as_secs());
                return Err(Error::load(&path, reason));
            }
        }
    }

    /// What changes while anybody, in Python too, downloads a content.
    fn growth(&self, etag: &str) -> Vec<(u64, Option<SystemTime>)> {
        let entries = fs::read_dir(self.folder.join("blobs")).into_iter().flatten().flatten();
        let growing = entries.filter(|entry| entry.file_name().to_str().is_some_and(|name| name.starts_with(etag)));
        growing.filter_map(|entry| entry.metadata().ok()).map(|data| (data.len(), data.modified().ok())).collect()
    }
}

/// Whether a file is there, in its size where that is known.
pub(super) fn is_file(path: &Path, size: Option<u64>) -> bool {
    fs::metadata(path).is_ok_and(|data| data.is_file() && size.is_none_or(|size| size == data.len()))
}

fn make_parent(path: &Path) -> Result<()> {
    let Some(parent) = path.parent() else { return Ok(()) };
    fs::create_dir_all(parent).map_err(|error| Error::load(parent, error))
}

#[cfg(unix)]
use std::os::unix::fs::symlink;
#[cfg(windows)]
use std::os::windows::fs::symlink_file as symlink;
#[cfg(not(any(unix, windows)))]
fn symlink(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
