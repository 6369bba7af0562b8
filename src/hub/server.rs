//! A hub on loopback for tests: the routes that a download takes, and their faults on demand.
#![allow(clippy::unwrap_used)]

use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

/// The one repository's commit.
pub(super) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Files from this length on are stored on the CDN, and have a sha-256.
pub(super) const LARGE: usize = 1000;

/// A server that runs until the test's process ends, and its store of large files on a port of its own.
pub(super) struct Server {
    pub endpoint: String,
    state: Arc<State>,
}

/// What goes wrong.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Trouble {
    /// Every request is refused.
    Down(u16, &'static str),
    /// A file is refused.
    Refused(&'static str, u16, &'static str),
    /// The first connections to the store end after as many bytes.
    Breaks { times: usize, after: usize },
    /// The store sends as many bytes, and then nothing.
    Stalls(usize),
    /// The store says nothing at all.
    Silent,
    /// The store sends files whole, whatever is asked for.
    NoRange,
    /// The store sends so many bytes less, or more, and says so.
    Length(isize),
    /// The store sends other bytes.
    Corrupt,
    /// The hub is where it redirects to.
    Moved,
    /// The hub does not tell how long files are.
    NoLength,
    /// The store takes its time.
    Slow(Duration),
}

struct State {
    files: BTreeMap<String, Vec<u8>>,
    troubles: Mutex<Vec<Trouble>>,
    log: Mutex<Vec<Request>>,
    store: String,
}

/// A request that came.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub method: String,
    pub path: String,
    pub range: Option<u64>,
    pub token: Option<String>,
    pub at_store: bool,
}

impl Server {
    pub fn new<const N: usize>(files: [(&str, &[u8]); N]) -> Self {
        let [hub, store] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let address = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
        let files = files.into_iter().map(|(name, content)| (name.to_owned(), content.to_vec())).collect();
        let state = State { files, troubles: Mutex::default(), log: Mutex::default(), store: address(&store) };
        let server = Self { endpoint: address(&hub), state: Arc::new(state) };
        for (listener, at_store) in [(hub, false), (store, true)] {
            let state = server.state.clone();
            thread::spawn(move || {
                for stream in listener.incoming() {
                    let state = state.clone();
                    thread::spawn(move || drop(state.serve(stream.unwrap(), at_store)));
                }
            });
        }
        server
    }

    pub fn trouble(&self, trouble: Trouble) {
        self.state.troubles.lock().unwrap().push(trouble);
    }

    pub fn heal(&self) {
        self.state.troubles.lock().unwrap().clear();
    }

    /// The requests since the last call.
    pub fn log(&self) -> Vec<Request> {
        std::mem::take(&mut *self.state.log.lock().unwrap())
    }
}

pub(super) fn sha256(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The name of a content: what git calls it does not matter to anybody.
pub(super) fn etag(content: &[u8]) -> String {
    let hash = sha256(content);
    if content.len() >= LARGE { hash } else { hash[..40].to_owned() }
}

impl State {
    /// Answers the requests of a connection, one after the other.
    fn serve(&self, mut stream: TcpStream, at_store: bool) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        loop {
            let Some(first) = lines.next() else { return Ok(()) };
            let first = first?;
            let mut words = first.split(' ').map(str::to_owned);
            let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            let mut request = Request { method, path, range: None, token: None, at_store };
            for line in &mut lines {
                let line = line?;
                match line.split_once(": ") {
                    None => break,
                    Some((name, value)) if name.eq_ignore_ascii_case("range") => {
                        request.range = Some(value.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap());
                    }
                    Some((name, value)) if name.eq_ignore_ascii_case("authorization") => request.token = Some(value.to_owned()),
                    _ => {}
                }
            }
            self.log.lock().unwrap().push(request.clone());
            let troubles = self.troubles.lock().unwrap().clone();
            let whole = if at_store { self.store(&mut stream, &request, &troubles)? } else { self.hub(&mut stream, &request, &troubles)? };
            if !whole {
                return Ok(());
            }
        }
    }

    fn hub(&self, stream: &mut TcpStream, request: &Request, troubles: &[Trouble]) -> std::io::Result<bool> {
        let path = request.path.split('?').next().unwrap();
        let refuse =
            |stream: &mut TcpStream, status: u16, code: &str| head(stream, status, &[("X-Error-Code", code), ("Content-Length", "0")]);
        for trouble in troubles {
            match trouble {
                Trouble::Down(status, code) => return refuse(stream, *status, code),
                Trouble::Refused(name, status, code) if path.ends_with(name) => return refuse(stream, *status, code),
                Trouble::Moved if path.contains("/owner/") => {
                    return head(stream, 307, &[("Location", &request.path.replace("/owner/", "/new/")), ("Content-Length", "0")]);
                }
                _ => {}
            }
        }
        let path = path.replace("/new/", "/owner/");
        if path == "/api/models/owner/name/revision/main" || path == "/api/models/owner/name/revision/refs%2Fpr%2F1" {
            let siblings: Vec<_> =
                self.files.iter().map(|(name, content)| serde_json::json!({"rfilename": name, "size": content.len()})).collect();
            let list = serde_json::json!({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).to_string();
            head(stream, 200, &[("Content-Length", &list.len().to_string())])?;
            stream.write_all(list.as_bytes())?;
            return Ok(true);
        }
        if path.starts_with("/api/models/owner/name/") {
            return refuse(stream, 404, "RevisionNotFound");
        }
        let Some(content) = path.strip_prefix(&format!("/owner/name/resolve/{COMMIT}/")).and_then(|name| self.files.get(name)) else {
            return refuse(stream, 404, "RepoNotFound");
        };
        let (len, etag) = (content.len().to_string(), format!("\"{}\"", etag(content)));
        if content.len() >= LARGE {
            let location = format!("{}{path}?signature=secret", self.store);
            let linked = [("X-Linked-Etag", &*etag), ("X-Linked-Size", &len), ("Location", &location), ("Content-Length", "0")];
            return head(stream, 302, &[("X-Repo-Commit", COMMIT)].iter().chain(&linked).copied().collect::<Vec<_>>());
        }
        let mut headers = vec![("X-Repo-Commit", COMMIT), ("ETag", &etag), ("Content-Length", &len)];
        if troubles.contains(&Trouble::NoLength) {
            headers.pop();
            headers.push(("Connection", "close"));
        }
        head(stream, 200, &headers)?;
        if request.method == "GET" {
            stream.write_all(content)?;
        }
        Ok(!troubles.contains(&Trouble::NoLength))
    }

    /// The store of large files. Its etags are its own, as those of real ones are.
    fn store(&self, stream: &mut TcpStream, request: &Request, troubles: &[Trouble]) -> std::io::Result<bool> {
        let name = request.path.split('?').next().unwrap().rsplit('/').next().unwrap();
        let mut content = self.files[name].clone();
        let (mut from, mut sent, mut pause) = (request.range.unwrap_or(0) as usize, None, Duration::ZERO);
        let mut troubles = troubles.to_vec();
        for trouble in &mut troubles {
            match trouble {
                Trouble::Breaks { times: times @ 1.., after } => {
                    sent = Some(*after);
                    *times -= 1;
                }
                Trouble::Stalls(bytes) => {
                    sent = Some(*bytes);
                    pause = Duration::from_secs(3);
                }
                Trouble::Silent => {
                    thread::sleep(Duration::from_secs(3));
                    return Ok(false);
                }
                Trouble::NoRange => from = 0,
                Trouble::Length(by) => content.resize(content.len().saturating_add_signed(*by), 7),
                Trouble::Corrupt => *content.last_mut().unwrap() ^= 1,
                Trouble::Slow(time) => thread::sleep(*time),
                _ => {}
            }
        }
        let mut current = self.troubles.lock().unwrap();
        if !current.is_empty() {
            *current = troubles;
        }
        drop(current);
        if from > content.len() {
            return head(stream, 416, &[("Content-Length", "0")]);
        }
        let (range, rest) = (format!("bytes {from}-{}/{}", content.len().saturating_sub(1), content.len()), &content[from..]);
        let mut headers = vec![("ETag", "\"of-the-store\"".to_owned()), ("Content-Length", rest.len().to_string())];
        if from > 0 {
            headers.push(("Content-Range", range));
        }
        let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        head(stream, if from > 0 { 206 } else { 200 }, &headers)?;
        stream.write_all(&rest[..sent.unwrap_or(rest.len()).min(rest.len())])?;
        stream.flush()?;
        thread::sleep(pause);
        Ok(sent.is_none())
    }
}

fn head(stream: &mut TcpStream, status: u16, headers: &[(&str, &str)]) -> std::io::Result<bool> {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    stream.write_all(format!("HTTP/1.1 {status} it is\r\n{headers}\r\n").as_bytes())?;
    Ok(true)
}
