//! One file's way into the cache: resumed where it broke off, and used only when its length and its hash are right.

use super::{
    cache::{Cache, is_file},
    client::{Client, Fault, Remote},
};
use crate::error::{Error, Result};
use sha2::{Digest, Sha256};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    path::PathBuf,
    thread,
};

/// Bytes between two reports. A connection that brings fewer has failed.
const STEP: u64 = 1 << 20;

/// Called with the number of a file's bytes that are there.
type Report<'a> = dyn FnMut(u64) -> Result<()> + 'a;

/// Brings a file into a commit's snapshot.
pub(super) fn fetch(client: &Client, cache: &Cache, commit: &str, remote: &Remote, report: &mut Report) -> Result<(), Fault> {
    let Remote { name, etag, size, .. } = remote;
    let _lock = cache.lock(etag, client.limits().lock, &mut || report(0))?;
    let blob = cache.blob(etag);
    if !is_file(&blob, Some(*size)) {
        let mut part = Part::open(cache.partial(etag), remote, report)?;
        let inherited = part.done > 0;
        part.fill(client, remote, report)?;
        if inherited && part.fault(remote).is_some() {
            // The beginning is from an earlier call, and nobody knows how that ended.
            part.restart()?;
            part.fill(client, remote, report)?;
        }
        part.keep(blob, remote)?;
    }
    report(*size)?;
    Ok(cache.link(commit, name, etag, *size)?)
}

/// A content that is not whole yet.
struct Part {
    path: PathBuf,
    file: File,
    done: u64,
    size: u64,
    hash: Sha256,
}

impl Part {
    /// Goes on with what an earlier call left, if its hash will tell whether that was right.
    fn open(path: PathBuf, remote: &Remote, report: &mut Report) -> Result<Self> {
        let failed = |error| Error::load(&path, error);
        let size = remote.size;
        if fs::metadata(&path).is_ok_and(|data| data.len() > size) {
            fs::remove_file(&path).map_err(failed)?;
        }
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        let mut part = Self { path, file, done: 0, size, hash: Sha256::new() };
        if remote.is_sha256() {
            let mut buffer = vec![0; 1 << 16];
            let mut reported = 0;
            loop {
                let len = part.file.read(&mut buffer).map_err(|error| Error::load(&part.path, error))?;
                if len == 0 {
                    break;
                }
                part.hash.update(&buffer[..len]);
                part.done += len as u64;
                if part.done >= reported + STEP {
                    reported = part.done;
                    report(part.done)?;
                }
            }
        }
        Ok(part)
    }

    /// Reads until all is there. A connection that breaks is made anew, until several in a row have brought nothing.
    fn fill(&mut self, client: &Client, remote: &Remote, report: &mut Report) -> Result<(), Fault> {
        let (mut best, mut failures) = (self.done, 0);
        while self.done < self.size {
            match self.receive(client, remote, report) {
                Err(fault) if fault.passes() => {
                    failures = if self.done >= best.saturating_add(STEP) { 0 } else { failures + 1 };
                    best = best.max(self.done);
                    if failures >= client.limits().tries {
                        return Err(fault);
                    }
                    thread::sleep(client.limits().pause * failures);
                }
                other => other?,
            }
        }
        Ok(())
    }

    fn receive(&mut self, client: &Client, remote: &Remote, report: &mut Report) -> Result<(), Fault> {
        let opened = match client.open(remote, self.done) {
            Err(Fault::Refused { status: 416, .. }) => client.open(remote, 0),
            other => other,
        };
        let (start, mut body) = opened?;
        if start != self.done {
            self.restart()?;
        }
        report(self.done)?;
        let (mut buffer, mut reported) = (vec![0; 1 << 16], self.done);
        loop {
            let len = match body.read(&mut buffer) {
                Ok(0) if self.done < self.size => {
                    return Err(Fault::Broken(format!("the connection ended after {} of {} bytes", self.done, self.size)));
                }
                Ok(0) => return Ok(()),
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(client.broken(error)),
            };
            if len as u64 > self.size - self.done {
                let _ = fs::remove_file(&self.path);
                return Err(Fault::Wrong(format!("more came than the {} bytes that were promised; it was thrown away", self.size)));
            }
            self.file.write_all(&buffer[..len]).map_err(|error| Error::load(&self.path, error))?;
            self.hash.update(&buffer[..len]);
            self.done += len as u64;
            if self.done >= reported + STEP {
                reported = self.done;
                report(self.done)?;
            }
        }
    }

    /// Back to the first byte. What lies there is written over, not cut off: another writer may be at it.
    fn restart(&mut self) -> Result<()> {
        self.file.seek(SeekFrom::Start(0)).map_err(|error| Error::load(&self.path, error))?;
        self.done = 0;
        self.hash = Sha256::new();
        Ok(())
    }

    /// What is wrong with the whole of it.
    fn fault(&self, remote: &Remote) -> Option<Fault> {
        let found: String = self.hash.clone().finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        (remote.is_sha256() && found != remote.etag)
            .then(|| Fault::Wrong(format!("what came has the sha-256 {found}, and {} was promised; it was thrown away", remote.etag)))
    }

    /// Gives a whole and right content its name.
    fn keep(self, blob: PathBuf, remote: &Remote) -> Result<(), Fault> {
        let fault = self.fault(remote);
        let failed = |error| Error::load(&self.path, error);
        if fault.is_some() || self.file.metadata().map_err(failed)?.len() != self.size {
            let _ = fs::remove_file(&self.path);
            return Err(fault.unwrap_or_else(|| Fault::Wrong(format!("what came is not {} bytes long", self.size))));
        }
        // Else a power cut could leave the name of a file without its bytes.
        self.file.sync_all().map_err(failed)?;
        Ok(fs::rename(&self.path, &blob).map_err(failed)?)
    }
}
