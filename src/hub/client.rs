//! The hub's routes over HTTP: what a repository holds, what a file is called by its content, and a file's bytes.

use super::{
    Repo, error,
    pick::is_inside,
    settings::{Limits, Settings},
};
use crate::error::Error;
use std::{collections::BTreeMap, io::Read, thread};
use ureq::{
    Agent, Body,
    http::{Response, StatusCode, Uri, header},
};

/// Redirects that are followed.
const HOPS: usize = 10;

/// Bytes of a listing that are read: the largest repositories have some ten thousand files.
const LISTING: u64 = 32 << 20;

/// Speaks to one hub about one repository.
pub(super) struct Client<'a> {
    agent: Agent,
    repo: &'a Repo,
    settings: &'a Settings,
}

/// A repository's files at a revision.
pub(super) struct Listing {
    pub commit: String,
    /// By name, with their sizes where the hub tells them.
    pub files: BTreeMap<String, Option<u64>>,
}

/// A file on the hub.
pub(super) struct Remote {
    pub name: String,
    pub size: u64,
    /// The name of its content: the sha-256 of a large file, else git's own hash.
    pub etag: String,
    url: String,
}

impl Remote {
    pub fn is_sha256(&self) -> bool {
        self.etag.len() == 64 && self.etag.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    }
}

/// Why something did not come.
#[derive(Debug)]
pub(super) enum Fault {
    /// There was no connection, or it did not hold.
    Broken(String),
    /// The server said no.
    Refused { status: u16, code: String },
    /// What the server said cannot be used.
    Wrong(String),
    /// The fault is on our side of the wire.
    Other(Error),
}

impl Fault {
    /// Whether another try may help.
    pub fn passes(&self) -> bool {
        matches!(self, Self::Broken(_) | Self::Refused { status: 408 | 429 | 500.., .. })
    }

    /// Whether what is in the cache is as good as before.
    pub fn leaves_cache(&self) -> bool {
        self.passes() || matches!(self, Self::Refused { status: 401 | 403, .. })
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

/// What is asked for: a list, what a file is, or its bytes from one on.
#[derive(Clone, Copy)]
enum Ask {
    List,
    Head,
    Bytes(u64),
}

impl<'a> Client<'a> {
    pub fn new(repo: &'a Repo, settings: &'a Settings) -> Self {
        let Limits { connect, stall, .. } = settings.limits;
        let config = Agent::config_builder()
            .user_agent(concat!("candle-generate/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            // Redirects are followed here, where it is known who may see the token.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(Some(connect))
            .timeout_connect(Some(connect))
            .timeout_recv_response(Some(stall))
            .timeout_per_read(Some(stall))
            .timeout_per_write(Some(stall));
        Self { agent: config.build().into(), repo, settings }
    }

    pub fn limits(&self) -> &Limits {
        &self.settings.limits
    }

    /// The commit and the files of the revision.
    pub fn list(&self) -> Result<Listing, Fault> {
        #[derive(serde::Deserialize)]
        struct Info {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(serde::Deserialize)]
        struct Sibling {
            rfilename: String,
            size: Option<u64>,
        }
        let revision = escaped(&self.settings.revision).replace('/', "%2F");
        let url = format!("{}/api/models/{}/revision/{revision}?blobs=true", self.settings.endpoint, self.repo);
        let text = self.retried(|| {
            let answer = self.follow(Ask::List, &url, |_| false)?;
            answer.into_body().with_config().limit(LISTING).read_to_vec().map_err(|error| self.broken(error))
        })?;
        let Info { sha, siblings } =
            serde_json::from_slice(&text).map_err(|error| Fault::Wrong(format!("its list of files does not parse: {error}")))?;
        if !is_plain(&sha) {
            return Err(Fault::Wrong(format!("it calls its commit {sha:?}, where a hash was expected")));
        }
        let files = siblings.into_iter().filter(|file| is_inside(&file.rfilename)).map(|file| (file.rfilename, file.size));
        Ok(Listing { commit: sha, files: files.collect() })
    }

    /// What a file is, without its bytes.
    pub fn head(&self, commit: &str, name: &str) -> Result<Remote, Fault> {
        let url = format!("{}/{}/resolve/{commit}/{}", self.settings.endpoint, self.repo, escaped(name));
        // A redirect to the store of large files says what these are; the store itself may not know the hub's names.
        let linked = |answer: &Response<Body>| text(answer, "x-linked-etag").is_some() && text(answer, "x-linked-size").is_some();
        let answer = self.retried(|| self.follow(Ask::Head, &url, linked))?;
        let etag = text(&answer, "x-linked-etag").or_else(|| text(&answer, "etag")).unwrap_or_default();
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
        let size = text(&answer, "x-linked-size").or_else(|| text(&answer, "content-length"));
        match size.and_then(|size| size.parse().ok()) {
            Some(size) if is_plain(&etag) => Ok(Remote { name: name.to_owned(), size, etag, url }),
            Some(_) => Err(Fault::Wrong(format!("its etag is {etag:?}, where a hash was expected"))),
            None => Err(Fault::Wrong("the server does not say how long it is".into())),
        }
    }

    /// A file's bytes from one on, or from the first if the server has it so; and from which.
    pub fn open(&self, remote: &Remote, from: u64) -> Result<(u64, impl Read + use<>), Fault> {
        let answer = self.follow(Ask::Bytes(from), &remote.url, |_| false)?;
        let start = match answer.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range = text(&answer, "content-range").unwrap_or_default();
                let start = range.strip_prefix("bytes ").and_then(|range| range.split_once('-')?.0.parse().ok());
                if start != Some(from) {
                    return Err(Fault::Wrong(format!("bytes from {from} on were asked for, and {range:?} came")));
                }
                from
            }
            _ => 0,
        };
        Ok((start, answer.into_body().into_reader()))
    }

    /// A connection that failed.
    pub fn broken(&self, error: impl Into<ureq::Error>) -> Fault {
        let seconds = self.settings.limits.stall.as_secs_f32();
        Fault::Broken(match error.into() {
            ureq::Error::Timeout(ureq::Timeout::Resolve | ureq::Timeout::Connect) => "no connection in time".into(),
            ureq::Error::Timeout(_) => format!("the server sent nothing for {seconds} seconds; HF_HUB_DOWNLOAD_TIMEOUT sets how long"),
            error => error.to_string(),
        })
    }

    /// What a caller is told, about a file or the repository.
    pub fn error(&self, fault: Fault, file: Option<&str>) -> Error {
        let Settings { endpoint, revision, token, .. } = self.settings;
        let subject = file.map_or_else(|| format!("from {endpoint}"), |file| format!("{file} from {endpoint}"));
        let reason = match fault {
            Fault::Other(error) => return error,
            Fault::Broken(reason) | Fault::Wrong(reason) => reason,
            Fault::Refused { status: status @ (401 | 403), code } => {
                let gate = match code.as_str() {
                    "GatedRepo" => format!("the repository is gated: accept its licence at {endpoint}/{}", self.repo),
                    _ => format!("the repository does not exist, is private, or is gated by a licence at {endpoint}/{}", self.repo),
                };
                let with = if token.is_some() { "the token that was sent has no access" } else { "no token was sent" };
                format!("{gate}; {with}: set HF_TOKEN, or the builder's token, to one of an account that has (status {status})")
            }
            Fault::Refused { status: 404, code } => match (code.as_str(), file) {
                ("RevisionNotFound", _) => format!("there is no revision {revision:?}; a branch, a tag or a commit is accepted"),
                (_, Some(_)) => "there is no such file, though the repository lists it".into(),
                (_, None) => "there is no such repository, nor a folder of that name here".into(),
            },
            Fault::Refused { status, .. } => format!("the server refused with status {status}"),
        };
        error(self.repo, format!("{subject}: {reason}"))
    }

    fn retried<T>(&self, mut work: impl FnMut() -> Result<T, Fault>) -> Result<T, Fault> {
        for failures in 1..self.settings.limits.tries {
            match work() {
                Err(fault) if fault.passes() => thread::sleep(self.settings.limits.pause * failures),
                other => return other,
            }
        }
        work()
    }

    /// The first answer that is no redirect, or one that is `enough`.
    fn follow(&self, ask: Ask, url: &str, enough: impl Fn(&Response<Body>) -> bool) -> Result<Response<Body>, Fault> {
        let mut url = url.to_owned();
        for _ in 0..HOPS {
            let answer = self.call(ask, &url)?;
            let status = answer.status();
            if status.is_success() || (status.is_redirection() && enough(&answer)) {
                return Ok(answer);
            }
            if !status.is_redirection() {
                return Err(Fault::Refused { status: status.as_u16(), code: text(&answer, "x-error-code").unwrap_or_default().to_owned() });
            }
            let target = text(&answer, "location").and_then(|location| joined(&url, location));
            url = target.ok_or_else(|| Fault::Wrong(format!("status {status} leads nowhere")))?;
        }
        Err(Fault::Wrong(format!("more than {HOPS} redirects")))
    }

    fn call(&self, ask: Ask, url: &str) -> Result<Response<Body>, Fault> {
        let request = if matches!(ask, Ask::Head) { self.agent.head(url) } else { self.agent.get(url) };
        // A compressed answer would have another length than the file.
        let mut request = request.header(header::ACCEPT_ENCODING, "identity");
        if let Ask::Bytes(from @ 1..) = ask {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        // The stores that large files are in get links that are signed; the token is for the hub alone.
        if let Some(token) = &self.settings.token
            && origin(url).is_some_and(|to| Some(to) == origin(&self.settings.endpoint))
        {
            request = request.header(header::AUTHORIZATION, format!("Bearer {}", token.0));
        }
        if !matches!(ask, Ask::Bytes(_)) {
            request = request.config().timeout_global(Some(self.settings.limits.stall * 2)).build();
        }
        request.call().map_err(|error| self.broken(error))
    }
}

fn text<'a>(answer: &'a Response<Body>, name: &str) -> Option<&'a str> {
    answer.headers().get(name)?.to_str().ok()
}

/// Whether a name from the server can be a file's.
fn is_plain(name: &str) -> bool {
    (1..=128).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

/// Scheme, host and port.
fn origin(url: &str) -> Option<(String, String, u16)> {
    let uri: Uri = url.parse().ok()?;
    let scheme = uri.scheme_str()?.to_owned();
    let port = uri.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
    Some((scheme, uri.host()?.to_ascii_lowercase(), port))
}

/// Where a redirect leads; none if that is no address, or if it would give up encryption.
fn joined(url: &str, location: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let target = if location.contains("://") {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{}{location}", rest.split('/').next()?)
    } else {
        format!("{}/{location}", url.split('?').next()?.rsplit_once('/')?.0)
    };
    let safe = target.starts_with("https://") || (scheme == "http" && target.starts_with("http://"));
    (safe && origin(&target).is_some()).then_some(target)
}

/// A path with percent signs for what an address cannot hold.
fn escaped(path: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~/".contains(&byte);
    path.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_joined_as_browsers_join_them() {
        let join = |location| joined("https://hub:8/a/b?x=/y", location);
        assert_eq!(join("/c?d").as_deref(), Some("https://hub:8/c?d"));
        assert_eq!(join("c").as_deref(), Some("https://hub:8/a/c"));
        assert_eq!(join("//cdn/c").as_deref(), Some("https://cdn/c"));
        assert_eq!(join("https://cdn/c").as_deref(), Some("https://cdn/c"));
        assert_eq!(join("http://cdn/c"), None, "no encryption");
        assert_eq!(join("ftp://cdn/c"), None);
        assert_eq!(joined("http://hub/a", "http://cdn/c").as_deref(), Some("http://cdn/c"));
    }

    #[test]
    fn origins_differ_by_scheme_host_or_port() {
        assert_eq!(origin("https://Hub/a"), origin("https://hub:443/b"));
        for other in ["http://hub/a", "https://hub:8/a", "https://hub.evil/a", "https://evil/hub"] {
            assert_ne!(origin("https://hub/a"), origin(other), "{other}");
        }
        assert_eq!(origin("hub/a"), None);
    }

    #[test]
    fn paths_are_escaped() {
        assert_eq!(escaped("a b/ü#?.txt"), "a%20b/%C3%BC%23%3F.txt");
    }
}
