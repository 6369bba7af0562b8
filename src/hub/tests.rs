//! Downloads from a hub on loopback, and all that can go wrong with them.
#![allow(clippy::unwrap_used)]

use super::{
    server::{COMMIT, Request, Server, Trouble, etag, sha256},
    settings::Limits,
    *,
};
use crate::progress::Progress;
use std::{
    fs,
    ops::ControlFlow,
    process::Command,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// Large enough for several reports.
const WEIGHTS: usize = 3 << 20;
const CONFIG: &[u8] = b"{\"model_type\": \"llama\"}";

/// Bytes that repeat only after long.
fn weights() -> Vec<u8> {
    (0..WEIGHTS as u32 / 4).flat_map(|index| index.wrapping_mul(2_654_435_761).to_le_bytes()).collect()
}

/// A repository of three files.
fn server() -> Server {
    Server::new([("config.json", CONFIG), ("tokenizer.json", b"{}"), ("model.safetensors", &weights()), ("README.md", b"# Read me")])
}

struct Home {
    folder: TempDir,
    settings: Settings,
}

fn home(server: &Server) -> Home {
    home_at(&server.endpoint)
}

fn home_at(endpoint: &str) -> Home {
    let folder = tempfile::tempdir().unwrap();
    let millis = Duration::from_millis;
    let limits = Limits { connect: millis(1000), stall: millis(400), lock: millis(600), pause: millis(1), tries: 3 };
    let settings = Settings {
        endpoint: endpoint.to_owned(),
        cache: folder.path().join("hub"),
        revision: "main".into(),
        token: None,
        offline: false,
        limits,
    };
    Home { folder, settings }
}

impl Home {
    fn get(&self) -> Result<PathBuf> {
        self.get_with(None)
    }

    fn get_with(&self, progress: Option<&OnProgress>) -> Result<PathBuf> {
        let begin = Instant::now();
        let outcome = snapshot(&repo(), &self.settings, progress);
        assert!(begin.elapsed() < Duration::from_secs(20), "it hangs");
        if outcome.is_err() {
            self.assert_nothing_half();
        }
        outcome
    }

    #[track_caller]
    fn refused(&self) -> String {
        let error = self.get().unwrap_err();
        assert_eq!(error.kind(), "hub", "{error}");
        error.to_string()
    }

    fn blobs(&self) -> PathBuf {
        self.settings.cache.join("models--owner--name/blobs")
    }

    fn partial(&self) -> PathBuf {
        self.blobs().join(format!("{}.incomplete", sha256(&weights())))
    }

    /// Leaves what an earlier call would have left.
    fn begun(&self, content: &[u8]) {
        fs::create_dir_all(self.blobs()).unwrap();
        fs::write(self.partial(), content).unwrap();
    }

    /// Whatever is called by a large content's hash has it, and whatever is linked is whole.
    fn assert_nothing_half(&self) {
        for blob in fs::read_dir(self.blobs()).into_iter().flatten() {
            let name = blob.unwrap().file_name().into_string().unwrap();
            if !name.ends_with(".incomplete") {
                assert_eq!(etag(&fs::read(self.blobs().join(&name)).unwrap()), name);
            }
        }
    }
}

fn repo() -> Repo {
    Repo::parse(Path::new("owner/name")).unwrap()
}

#[track_caller]
fn assert_whole(folder: &Path) {
    assert!(folder.ends_with(format!("models--owner--name/snapshots/{COMMIT}")), "{folder:?}");
    assert_eq!(fs::read(folder.join("config.json")).unwrap(), CONFIG);
    assert_eq!(fs::read(folder.join("tokenizer.json")).unwrap(), b"{}");
    assert!(fs::read(folder.join("model.safetensors")).unwrap() == weights());
    assert!(!folder.join("README.md").exists());
}

fn routes(log: &[Request]) -> Vec<String> {
    log.iter().map(|request| format!("{} {}", request.method, request.path.rsplit('/').next().unwrap())).collect()
}

/// The bytes from which the weights were asked for.
fn ranges(server: &Server) -> Vec<Option<u64>> {
    server.log().into_iter().filter(|request| request.at_store).map(|request| request.range).collect()
}

fn recorded() -> (OnProgress, Arc<Mutex<Vec<Progress>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let record = seen.clone();
    let progress = OnProgress::new(move |progress| {
        record.lock().unwrap().push(progress);
        ControlFlow::Continue(())
    });
    (progress, seen)
}

#[test]
fn names_of_repositories() {
    let parsed = |name: &str| Repo::parse(Path::new(name)).map(|repo| (repo.id, repo.revision));
    assert_eq!(parsed("owner/name"), Some(("owner/name".into(), None)));
    assert_eq!(parsed("Qwen/Qwen2.5-0.5B@refs/pr/1"), Some(("Qwen/Qwen2.5-0.5B".into(), Some("refs/pr/1".into()))));
    for folder in
        ["name", "a/b/c", "./name", "../name", "/name", "a//b", "a/", "a b/c", "a--b/c", "a/b..c", "a/-b", "~/models", "a\\b/c", ""]
    {
        assert_eq!(parsed(folder), None, "{folder}");
    }
}

#[test]
fn a_download_with_progress_and_then_a_hit() {
    let (server, (progress, seen)) = (server(), recorded());
    let home = home(&server);
    let folder = home.get_with(Some(&progress)).unwrap();
    assert_whole(&folder);
    let files = ["config.json", "tokenizer.json", "model.safetensors"];
    let asked = |method: &str| files.iter().map(|file| format!("{method} {file}")).collect::<Vec<_>>();
    let stored = "GET model.safetensors?signature=secret".to_owned();
    assert_eq!(routes(&server.log()), [vec!["GET main?blobs=true".into()], asked("HEAD"), asked("GET"), vec![stored]].concat());
    let seen = seen.lock().unwrap().clone();
    let total = (CONFIG.len() + 2 + WEIGHTS) as u64;
    assert!(seen.iter().all(|progress| progress.stage == Stage::Download && progress.total == total), "{seen:?}");
    assert!(seen.is_sorted_by_key(|progress| progress.done) && seen.len() > 4, "{seen:?}");
    assert_eq!(seen.last().unwrap().done, total);
    #[cfg(unix)]
    assert_eq!(fs::read_link(folder.join("model.safetensors")).unwrap(), Path::new("../../blobs").join(sha256(&weights())));

    assert_eq!(home.get().unwrap(), folder);
    assert_eq!(routes(&server.log()), ["GET main?blobs=true"], "one request asks for the commit, none for files");
}

#[test]
fn another_revision_of_the_same_files_is_linked_without_their_bytes() {
    let server = server();
    let mut home = home(&server);
    home.get().unwrap();
    fs::remove_dir_all(home.settings.cache.join("models--owner--name/snapshots")).unwrap();
    server.log();
    home.settings.revision = "refs/pr/1".into();
    assert_whole(&home.get().unwrap());
    assert!(server.log().iter().all(|request| !request.at_store && (request.method == "HEAD" || request.path.starts_with("/api/"))));
    home.settings.offline = true;
    assert_whole(&home.get().unwrap());
}

#[test]
fn offline_serves_a_warm_cache_and_says_what_a_cold_one_lacks() {
    let server = server();
    let mut home = home(&server);
    home.settings.offline = true;
    assert!(home.refused().contains("offline, and revision main is not in the cache"));
    home.settings.offline = false;
    let folder = home.get().unwrap();
    server.log();
    home.settings.offline = true;
    assert_eq!(home.get().unwrap(), folder);
    home.settings.revision = COMMIT.into();
    assert_eq!(home.get().unwrap(), folder);
    home.settings.revision = "other".into();
    assert!(home.refused().contains("and revision other is not in the cache"));
    home.settings.revision = "main".into();
    fs::remove_file(folder.join("model.safetensors")).unwrap();
    assert!(home.refused().contains("config.json or the weights of revision main"));
    assert!(server.log().is_empty());
}

#[test]
fn a_hub_out_of_reach_leaves_the_cache() {
    let server = server();
    let mut home = home(&server);
    let folder = home.get().unwrap();
    for (status, code) in [(503, ""), (429, ""), (401, "GatedRepo"), (403, "GatedRepo")] {
        server.trouble(Trouble::Down(status, code));
        assert_eq!(home.get().unwrap(), folder, "{status}");
        server.heal();
    }
    server.trouble(Trouble::Down(404, "RepoNotFound"));
    assert!(home.refused().contains("no such repository"));
    // Nobody listens on a port that was just given back.
    home.settings.endpoint = format!("http://{}", std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    assert_eq!(home.get().unwrap(), folder);
    fs::remove_dir_all(&home.settings.cache).unwrap();
    assert!(home.refused().contains("Connection refused") || home.refused().contains("connection"), "{}", home.refused());
}

#[test]
fn refusals_say_what_would_help() {
    let server = server();
    let mut home = home(&server);
    for (trouble, part) in [
        (Trouble::Down(404, "RepoNotFound"), "there is no such repository, nor a folder of that name here"),
        (Trouble::Down(401, ""), "does not exist, is private, or is gated"),
        (Trouble::Down(500, ""), "status 500"),
        (Trouble::Refused("config.json", 401, "GatedRepo"), "config.json from http://127.0.0.1"),
        (Trouble::Refused("config.json", 401, "GatedRepo"), "accept its licence at http://127.0.0.1"),
        (Trouble::Refused("config.json", 401, "GatedRepo"), "no token was sent: set HF_TOKEN"),
        (Trouble::Refused("tokenizer.json", 404, "EntryNotFound"), "tokenizer.json from"),
        (Trouble::NoLength, "the server does not say how long it is"),
    ] {
        server.trouble(trouble.clone());
        assert!(home.refused().contains(part), "{trouble:?}: {}", home.refused());
        server.heal();
    }
    home.settings.token = Some(Token("hf_secret".into()));
    server.trouble(Trouble::Refused("config.json", 403, "GatedRepo"));
    let refused = home.refused();
    assert!(refused.contains("the token that was sent has no access") && !refused.contains("hf_secret"), "{refused}");
    server.heal();
    home.settings.revision = "v9".into();
    assert!(home.refused().contains(r#"there is no revision "v9""#));
    let bare = Server::new([("config.json", CONFIG), ("model.gguf", b"")]);
    assert!(home_at(&bare.endpoint).refused().contains("lacks config.json or weights in a form that is read"));
}

#[test]
fn the_token_is_for_the_hub_alone() {
    let server = server();
    let mut home = home(&server);
    home.settings.token = Some(Token("hf_secret".into()));
    home.get().unwrap();
    let log = server.log();
    assert!(log.iter().any(|request| request.at_store));
    assert!(log.iter().all(|request| request.token.as_deref() == (!request.at_store).then_some("Bearer hf_secret")), "{log:?}");
}

#[test]
fn a_repository_that_moved_is_followed() {
    let server = server();
    server.trouble(Trouble::Moved);
    assert_whole(&home(&server).get().unwrap());
}

#[test]
fn shards_come_after_their_index() {
    let index = br#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
    let (one, two) = (vec![1; 2000], vec![2; 3000]);
    let files: [(&str, &[u8]); 5] = [
        ("config.json", CONFIG),
        ("model.safetensors.index.json", index),
        ("model-1.safetensors", &one),
        ("model-2.safetensors", &two),
        ("pytorch_model.bin", &one),
    ];
    let server = Server::new(files);
    let (mut home, (progress, seen)) = (home(&server), recorded());
    let folder = home.get_with(Some(&progress)).unwrap();
    assert_eq!((fs::read(folder.join("model-1.safetensors")).unwrap(), fs::read(folder.join("model-2.safetensors")).unwrap()), (one, two));
    assert!(!folder.join("pytorch_model.bin").exists());
    assert!(seen.lock().unwrap().iter().all(|progress| progress.total == (CONFIG.len() + 5000) as u64));
    home.settings.offline = true;
    home.get().unwrap();
    fs::remove_file(folder.join("model-2.safetensors")).unwrap();
    assert!(home.refused().contains("model-2.safetensors of revision main is not in the cache"));

    let lying = Server::new([("config.json", CONFIG), ("pytorch_model.bin.index.json", index)]);
    assert!(home_at(&lying.endpoint).refused().contains("lists model-1.safetensors, which the repository does not have"));
    let escape = Server::new([("config.json", CONFIG), ("model.safetensors.index.json", br#"{"weight_map": {"a": "../../x"}}"#)]);
    let error = home_at(&escape.endpoint).get().unwrap_err().to_string();
    assert!(error.contains(r#"shard "../../x" is outside the folder"#), "{error}");
}

#[test]
fn connections_that_break_are_resumed() {
    let server = server();
    server.trouble(Trouble::Breaks { times: 2, after: WEIGHTS / 4 });
    assert_whole(&home(&server).get().unwrap());
    assert_eq!(ranges(&server), [None, Some(WEIGHTS as u64 / 4), Some(WEIGHTS as u64 / 2)]);
}

#[test]
fn what_broke_off_is_resumed_by_the_next_call() {
    let server = server();
    let home = home(&server);
    server.trouble(Trouble::Breaks { times: 99, after: 1000 });
    assert!(home.refused().contains("model.safetensors from"));
    assert_eq!(fs::metadata(home.partial()).unwrap().len(), 3000, "of three tries");
    server.heal();
    server.log();
    let (progress, seen) = recorded();
    assert_whole(&home.get_with(Some(&progress)).unwrap());
    assert_eq!(ranges(&server), [Some(3000)]);
    assert_eq!(seen.lock().unwrap()[0].done, 3000);
    assert!(!home.partial().exists());
}

#[test]
fn beginnings_that_do_not_fit_are_thrown_away() {
    let server = server();
    for begun in [vec![9; 1000], vec![9; WEIGHTS], vec![9; WEIGHTS + 1]] {
        let home = home(&server);
        home.begun(&begun);
        assert_whole(&home.get().unwrap());
        home.assert_nothing_half();
    }
    let home = home(&server);
    home.begun(&weights());
    server.log();
    assert_whole(&home.get().unwrap());
    assert!(ranges(&server).is_empty(), "all of it was there");
}

#[test]
fn a_server_without_ranges_sends_it_all_again() {
    let server = server();
    let home = home(&server);
    server.trouble(Trouble::NoRange);
    server.trouble(Trouble::Breaks { times: 1, after: 5000 });
    assert_whole(&home.get().unwrap());
    assert_eq!(ranges(&server), [None, Some(5000)]);
}

#[test]
fn a_server_that_stalls_ends_in_an_error() {
    let server = server();
    let home = home(&server);
    for trouble in [Trouble::Stalls(1000), Trouble::Silent] {
        server.trouble(trouble);
        let refused = home.refused();
        assert!(refused.contains("model.safetensors") && refused.contains("nothing for 0.4 seconds"), "{refused}");
        server.heal();
    }
    assert_whole(&home.get().unwrap());
}

#[test]
fn lengths_that_differ_are_refused() {
    let server = server();
    for (by, part) in [(-1, format!("after {} of {WEIGHTS} bytes", WEIGHTS - 1)), (1, format!("more came than the {WEIGHTS} bytes"))] {
        let home = home(&server);
        server.trouble(Trouble::Length(by));
        assert!(home.refused().contains(&part), "{}", home.refused());
        server.heal();
        assert_whole(&home.get().unwrap());
    }
}

#[test]
fn a_wrong_hash_is_refused() {
    let server = server();
    let home = home(&server);
    server.trouble(Trouble::Corrupt);
    let refused = home.refused();
    assert!(refused.contains("sha-256") && refused.contains(&sha256(&weights())), "{refused}");
    assert!(!home.partial().exists());
    server.heal();
    assert_whole(&home.get().unwrap());
}

#[test]
fn files_that_were_cut_are_fetched_again() {
    let server = server();
    let home = home(&server);
    let folder = home.get().unwrap();
    fs::write(home.blobs().join(sha256(&weights())), b"cut").unwrap();
    fs::remove_file(folder.join("tokenizer.json")).unwrap();
    fs::write(folder.join("tokenizer.json"), b"longer than it was").unwrap();
    assert_whole(&home.get().unwrap());
}

#[test]
fn cancelling_keeps_what_came() {
    let server = server();
    let home = home(&server);
    let progress = OnProgress::new(|progress| match progress.done > 1 << 20 {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    });
    assert_eq!(home.get_with(Some(&progress)).unwrap_err().kind(), "cancelled");
    let kept = fs::metadata(home.partial()).unwrap().len();
    assert!(kept >= 1 << 20);
    server.log();
    assert_whole(&home.get().unwrap());
    assert_eq!(ranges(&server), [Some(kept)]);
}

#[test]
fn threads_at_once_download_once() {
    let server = server();
    let home = home(&server);
    server.trouble(Trouble::Slow(Duration::from_millis(200)));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_whole(&home.get().unwrap()));
        }
    });
    assert_eq!(ranges(&server), [None]);
}

#[test]
fn a_lock_that_is_never_given_back_ends_in_an_error() {
    let server = server();
    let home = home(&server);
    let cache = Cache::new(&home.settings.cache, "owner/name");
    let held = cache.lock(&etag(CONFIG), Duration::ZERO, &mut || Ok(())).unwrap();
    let error = home.get().unwrap_err().to_string();
    assert!(error.contains(".lock") && error.contains("another process has held this lock"), "{error}");
    drop(held);
    assert_whole(&home.get().unwrap());
}

#[test]
fn two_processes_at_once_download_once() {
    let server = server();
    let home = home(&server);
    server.trouble(Trouble::Slow(Duration::from_millis(300)));
    let child = || {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["hub::tests::as_a_process_of_its_own", "--exact", "--ignored"]);
        command.env("HUB_ENDPOINT", &server.endpoint).env("HUB_HOME", home.folder.path()).spawn().unwrap()
    };
    let children = [child(), child()];
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(ranges(&server), [None]);
    server.heal();
    assert_whole(&home.get().unwrap());
}

#[test]
#[ignore = "run by two_processes_at_once_download_once"]
fn as_a_process_of_its_own() {
    let [endpoint, folder] = ["HUB_ENDPOINT", "HUB_HOME"].map(|name| std::env::var(name).unwrap());
    let mut home = home_at(&endpoint);
    home.settings.cache = Path::new(&folder).join("hub");
    home.settings.limits.lock = Duration::from_secs(5);
    assert_whole(&home.get().unwrap());
}

#[cfg(unix)]
#[test]
fn a_cache_of_python_is_a_hit() {
    // As huggingface_hub 2.4 leaves it.
    let server = server();
    let mut home = home(&server);
    let folder = home.settings.cache.join("models--owner--name");
    let snapshot = folder.join("snapshots").join(COMMIT);
    for path in [&snapshot, &folder.join("blobs"), &folder.join("refs")] {
        fs::create_dir_all(path).unwrap();
    }
    fs::write(folder.join("refs/main"), COMMIT).unwrap();
    for (name, content) in [("config.json", CONFIG), ("tokenizer.json", b"{}"), ("model.safetensors", &weights())] {
        fs::write(folder.join("blobs").join(etag(content)), content).unwrap();
        std::os::unix::fs::symlink(format!("../../blobs/{}", etag(content)), snapshot.join(name)).unwrap();
    }
    assert_whole(&home.get().unwrap());
    assert_eq!(routes(&server.log()), ["GET main?blobs=true"]);
    home.settings.offline = true;
    assert_whole(&home.get().unwrap());
}
