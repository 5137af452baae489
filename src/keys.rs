//! The key file: who may do what, and `kiss-vdb keys`, which writes it.
//!
//! A key is a secret of 256 random bits that is shown once; the file holds its SHA-256 alone. (A slow hash is for secrets
//! that people choose; this one cannot be guessed.) The server looks at the file once a second and takes it over when it
//! changed; a file that cannot be read leaves the keys as they were.
//!
//! ```toml
//! [[key]]
//! name = "worker"
//! sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
//! rights = ["read", "write"]
//! prefixes = ["jobs/"]                 # keys that begin so
//! collections = ["docs"]               # "*" = all
//! expires = "2027-01-01T00:00:00Z"
//! ```
//! Without `prefixes` and `collections` a key reaches everything; with either, what is named and nothing else. Events
//! that belong to no key and no collection are for keys that reach everything. `admin` is everything, so it has no limits.

use crate::error::{Error, Rejection};
use crate::vector::CollectionName;
use anyhow::{Context, anyhow, bail, ensure};
use base64::Engine as _;
use clap::{Args, Subcommand, ValueEnum};
use ring::digest::{SHA256, digest};
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Keys in one file.
pub const KEYS_MAX: usize = 10_000;
/// Prefixes and collections one key may name: they are terms of its streams' filters.
pub const LIMITS_MAX: usize = 64;
/// Longest name of a key, in bytes.
const NAME_BYTES_MAX: usize = 64;
/// What the key without a file is called: no key of a file may share its limits and retries.
const SERVER_KEY: &str = "API_KEY";
/// What every secret begins with, so that scanners of source code find one that was committed.
const SECRET_PREFIX: &str = "kiss_";

/// The SHA-256 of a secret.
pub type Digest = [u8; 32];

/// Hashes a secret.
#[must_use]
pub fn digest_of(secret: &str) -> Digest {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, secret.as_bytes()).as_ref());
    out
}

/// What a key may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Right {
    /// Get, list, search, stream.
    Read,
    /// Change keys, vectors and collections; publish.
    Write,
    /// Everything, snapshots and backups included.
    Admin,
}

/// The limits of a key: keys by prefix, collections by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Within {
    /// Keys that begin with one of these,
    pub prefixes: Vec<String>,
    /// and these collections; `*` = all.
    pub collections: Vec<String>,
}

impl Within {
    /// Checks the names.
    pub fn check(&self) -> Result<(), Rejection> {
        if self.prefixes.len() + self.collections.len() > LIMITS_MAX {
            return Err(Rejection::invalid(format!("at most {LIMITS_MAX} prefixes and collections together")));
        }
        for prefix in self.prefixes.iter().filter(|p| !p.is_empty()) {
            crate::engine::command::Key::check(prefix)?;
        }
        self.collections.iter().filter(|c| *c != "*").try_for_each(|c| CollectionName::new(c).map(drop))
    }

    /// Whether a key, or every key that begins so, is inside.
    #[must_use]
    pub fn holds_key(&self, key: &str) -> bool {
        self.prefixes.iter().any(|prefix| key.starts_with(prefix.as_str()))
    }

    /// Whether a collection is inside.
    #[must_use]
    pub fn holds_collection(&self, name: &str) -> bool {
        self.collections.iter().any(|c| c == name || c == "*")
    }

    /// Whether all of another is inside.
    #[must_use]
    pub fn holds(&self, other: &Self) -> bool {
        other.prefixes.iter().all(|p| self.holds_key(p)) && other.collections.iter().all(|c| self.holds_collection(c))
    }
}

/// Who asks, and what they may do. A key of the file, or a token made from one.
#[derive(Clone, Debug)]
pub struct Grant {
    /// The key's name.
    pub name: Box<str>,
    /// Its rights.
    pub rights: Vec<Right>,
    /// `None` = everything.
    pub within: Option<Within>,
    /// Unix milliseconds after which it is worth nothing.
    pub expires_at_ms: Option<u64>,
    /// Set when the key is gone or was changed: its streams end.
    revoked: Arc<AtomicBool>,
}

impl Grant {
    fn has(&self, right: Right) -> bool {
        self.rights.contains(&right) || self.rights.contains(&Right::Admin)
    }

    /// Whether it was revoked.
    #[must_use]
    pub fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::Acquire)
    }

    /// Whether its time is over.
    #[must_use]
    pub fn is_expired(&self, now_ms: u64) -> bool {
        self.expires_at_ms.is_some_and(|at| at <= now_ms)
    }

    /// Refuses what the key has no right to.
    pub fn need(&self, right: Right) -> Result<(), Rejection> {
        if self.has(right) {
            return Ok(());
        }
        let word = format!("{right:?}").to_lowercase();
        Err(Rejection::Forbidden(format!("the key {:?} has no right to {word}; use one created with it", self.name)))
    }

    /// Refuses a key outside the limits.
    pub fn need_key(&self, right: Right, key: &str) -> Result<(), Rejection> {
        self.need(right)?;
        match &self.within {
            Some(within) if !within.holds_key(key) => {
                Err(self.outside(&format!("keys that begin with {:?}", within.prefixes)))
            }
            _ => Ok(()),
        }
    }

    /// Refuses a collection outside the limits.
    pub fn need_collection(&self, right: Right, name: &str) -> Result<(), Rejection> {
        self.need(right)?;
        match &self.within {
            Some(within) if !within.holds_collection(name) => {
                Err(self.outside(&format!("the collections {:?}", within.collections)))
            }
            _ => Ok(()),
        }
    }

    /// Refuses a key with limits.
    pub fn need_everything(&self, right: Right) -> Result<(), Rejection> {
        self.need(right)?;
        if self.within.is_none() { Ok(()) } else { Err(self.outside("a part of the keys and collections")) }
    }

    fn outside(&self, what: &str) -> Rejection {
        Rejection::Forbidden(format!(
            "the key {:?}, or this token of it, reaches only {what}; name something within, or use another",
            self.name
        ))
    }

    /// The same key with fewer rights and a shorter life.
    #[must_use]
    pub fn narrowed(&self, rights: Vec<Right>, within: Option<Within>, expires_at_ms: u64) -> Self {
        let expires_at_ms = Some(self.expires_at_ms.map_or(expires_at_ms, |at| at.min(expires_at_ms)));
        Self { name: self.name.clone(), rights, within, expires_at_ms, revoked: Arc::clone(&self.revoked) }
    }

    /// The one key of a server without a file: it may do everything.
    #[must_use]
    pub fn everything() -> Self {
        Self {
            name: SERVER_KEY.into(),
            rights: vec![Right::Admin],
            within: None,
            expires_at_ms: None,
            revoked: Arc::default(),
        }
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    key: Vec<Row>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    name: String,
    sha256: String,
    rights: Vec<Right>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prefixes: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    collections: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires: Option<String>,
}

impl Row {
    /// Checks the row.
    fn parse(&self) -> anyhow::Result<(Digest, Grant)> {
        ensure!(!self.name.is_empty() && self.name.len() <= NAME_BYTES_MAX, "a name is 1 to {NAME_BYTES_MAX} bytes");
        ensure!(!self.name.chars().any(char::is_control), "a name has no control characters");
        ensure!(self.name != SERVER_KEY, "{SERVER_KEY} is the name of the server's own key");
        ensure!(!self.rights.is_empty(), "rights names at least one of read, write, admin");
        let sha256 = decode_hex(&self.sha256).context("sha256 is 64 hexadecimal digits")?;
        let within = (self.prefixes.is_some() || self.collections.is_some()).then(|| Within {
            prefixes: self.prefixes.clone().unwrap_or_default(),
            collections: self.collections.clone().unwrap_or_default(),
        });
        ensure!(
            within.is_none() || !self.rights.contains(&Right::Admin),
            "an admin key reaches everything: leave out prefixes and collections"
        );
        if let Some(within) = &within {
            within.check()?;
        }
        let expires_at_ms = self.expires.as_deref().map(parse_time).transpose()?;
        let grant = Grant {
            name: self.name.as_str().into(),
            rights: self.rights.clone(),
            within,
            expires_at_ms,
            revoked: Arc::default(),
        };
        Ok((sha256, grant))
    }
}

fn parse_time(text: &str) -> anyhow::Result<u64> {
    let time: jiff::Timestamp = text.parse().context("expires is a time such as 2027-01-31T12:00:00Z")?;
    u64::try_from(time.as_millisecond()).context("expires is after 1970")
}

fn decode_hex(text: &str) -> Option<Digest> {
    let mut out = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (byte, at) in out.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&text[at..at + 2], 16).ok()?;
    }
    Some(out)
}

fn encode_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The keys of a file by the first bytes of their digests. What a look-up could tell by its time is about a digest, which
/// leads to no secret; the rest is compared in constant time.
#[derive(Debug, Default)]
pub struct Keyring {
    keys: std::collections::HashMap<[u8; 8], (Digest, Arc<Grant>)>,
}

/// Where a digest stands in a ring: its first bytes. Tokens name their key by it.
#[must_use]
pub fn place_of(digest: &Digest) -> [u8; 8] {
    let (place, _) = digest.split_first_chunk().expect("a digest has 32 bytes");
    *place
}

impl Keyring {
    /// Reads a key file. A name or a secret that stands twice is refused: which one counts would be a guess.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let file = read_file(path).map_err(|error| Error::Config(format!("{error:#}")))?;
        let mut keys = std::collections::HashMap::new();
        let mut names = std::collections::HashSet::new();
        for row in &file.key {
            let bad = |error: &str| Error::Config(format!("{}: key {:?}: {error}", path.display(), row.name));
            let (digest, grant) = row.parse().map_err(|error| bad(&format!("{error:#}")))?;
            if !names.insert(&row.name) {
                return Err(bad("the name stands twice"));
            }
            if keys.insert(place_of(&digest), (digest, Arc::new(grant))).is_some() {
                return Err(bad("its secret stands twice"));
            }
        }
        Ok(Self { keys })
    }

    /// Adds the key that may do everything.
    pub fn add(&mut self, digest: Digest, grant: Grant) {
        self.keys.insert(place_of(&digest), (digest, Arc::new(grant)));
    }

    /// Whose secret has this digest.
    #[must_use]
    pub fn find(&self, digest: &Digest) -> Option<&Arc<Grant>> {
        let (known, grant) = self.keys.get(&place_of(digest))?;
        same(known, digest).then_some(grant)
    }

    /// Whose digest begins so, and is called so: what a token names.
    #[must_use]
    pub fn find_by_place(&self, place: &[u8; 8], name: &str) -> Option<&Arc<Grant>> {
        self.keys.get(place).map(|(_, grant)| grant).filter(|grant| *grant.name == *name)
    }

    /// Keys there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether nobody has a key.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Takes over from an older one: keys that did not change stay, with their streams; the others are revoked. Returns
    /// how many were.
    pub fn replace(&mut self, older: &Self) -> usize {
        let mut revoked = 0;
        for (place, (digest, grant)) in &older.keys {
            match self.keys.get_mut(place) {
                Some((new_digest, new)) if new_digest == digest && is_alike(new, grant) => *new = Arc::clone(grant),
                _ => {
                    grant.revoked.store(true, Ordering::Release);
                    revoked += 1;
                }
            }
        }
        revoked
    }
}

/// Compares in a time that does not depend on where the difference is.
#[must_use]
pub fn same(a: &Digest, b: &Digest) -> bool {
    std::hint::black_box(a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b))) == 0
}

fn is_alike(a: &Grant, b: &Grant) -> bool {
    a.name == b.name && a.rights == b.rights && a.within == b.within && a.expires_at_ms == b.expires_at_ms
}

fn read_file(path: &Path) -> anyhow::Result<File> {
    use std::io::ErrorKind::{NotFound, PermissionDenied};
    let text = std::fs::read_to_string(path).map_err(|error| {
        let advice = match error.kind() {
            NotFound => "kiss-vdb keys create makes one",
            PermissionDenied => "let the user that runs this read it",
            _ => "name a file that kiss-vdb keys create has made",
        };
        anyhow!("the key file {} (keys_file, KEYS_FILE) cannot be read ({error}): {advice}", path.display())
    })?;
    let file: File = toml::from_str(&text).map_err(|error| {
        // Its own text shows the line: nothing of this file belongs in a log.
        let at = error.span().map_or(0, |span| span.start);
        let line = text.bytes().take(at).filter(|&byte| byte == b'\n').count() + 1;
        anyhow!(
            "the key file {} (keys_file, KEYS_FILE) is not one, by its line {line} ({}): mend it, or name one that kiss-vdb keys create has made",
            path.display(),
            error.message().lines().next().unwrap_or_default()
        )
    })?;
    ensure!(file.key.len() <= KEYS_MAX, "{}: at most {KEYS_MAX} keys", path.display());
    Ok(file)
}

/// One change at a time: two who read the same file would each write it without the other's. Held until dropped.
fn lock(path: &Path) -> anyhow::Result<std::fs::File> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let file = std::fs::File::create(&name).with_context(|| format!("cannot write {}", name.display()))?;
    file.lock().with_context(|| format!("cannot lock {}", name.display()))?;
    Ok(file)
}

/// Replaces the file as a whole, readable by its owner alone.
fn write_file(path: &Path, file: &File) -> anyhow::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Made with mode 0600.
    let mut new = tempfile::NamedTempFile::new_in(dir).with_context(|| format!("cannot write to {}", dir.display()))?;
    new.write_all(b"# Keys of a kiss-vdb server; see kiss-vdb keys --help. A running server takes changes over.\n")?;
    new.write_all(toml::to_string(file)?.as_bytes())?;
    // Whoever could read the old one, the server above all, can read the new one.
    if let Ok(old) = std::fs::metadata(path) {
        use std::os::unix::fs::MetadataExt;
        new.as_file().set_permissions(old.permissions())?;
        std::os::unix::fs::fchown(new.as_file(), Some(old.uid()), Some(old.gid()))
            .with_context(|| format!("cannot leave {} to its owner; run this as that user", path.display()))?;
    }
    new.as_file().sync_all()?;
    new.persist(path).with_context(|| format!("cannot write {}", path.display()))?;
    std::fs::File::open(dir)?.sync_all()?;
    Ok(())
}

/// Flags of `kiss-vdb keys`.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:
  kiss-vdb keys create worker --rights read,write --prefix jobs/ --collection docs --expires 90d
  kiss-vdb keys list
  kiss-vdb keys revoke worker

The server reads the file named by KEYS_FILE, and takes changes over within a second.")]
pub struct KeysArgs {
    #[command(subcommand)]
    verb: Verb,
    /// The key file
    #[arg(long, value_name = "FILE", env = "KEYS_FILE", default_value = "kiss-keys.toml", global = true)]
    file: PathBuf,
}

#[derive(Clone, Debug, Subcommand)]
enum Verb {
    /// Make a key and print its secret, once
    Create {
        /// What to call it
        name: String,
        /// What it may do
        #[arg(long, value_enum, value_delimiter = ',', default_value = "read,write")]
        rights: Vec<Right>,
        /// Limit it to keys that begin so; may be given several times
        #[arg(long = "prefix", value_name = "PREFIX")]
        prefixes: Vec<String>,
        /// Limit it to this collection (* = all); may be given several times
        #[arg(long = "collection", value_name = "NAME")]
        collections: Vec<String>,
        /// When it ends: a time (2027-01-31T12:00:00Z) or a span (90d, 12h, 30m)
        #[arg(long, value_name = "WHEN")]
        expires: Option<String>,
    },
    /// Show the keys; secrets are not kept, so they cannot be shown
    List,
    /// Take a key away: it and its streams end within a second
    Revoke {
        /// Which
        name: String,
    },
}

/// A time, or a span from now.
fn expiry(text: &str) -> anyhow::Result<String> {
    let span = |unit: char, hours: f64| {
        let number: f64 = text.strip_suffix(unit)?.parse().ok()?;
        jiff::SignedDuration::try_from_secs_f64(number * hours * 3600.0).ok().filter(|span| span.is_positive())
    };
    let time = match span('d', 24.0).or_else(|| span('h', 1.0)).or_else(|| span('m', 1.0 / 60.0)) {
        Some(span) => jiff::Timestamp::now().checked_add(span).context("that is too far away")?,
        None => text.parse().with_context(|| {
            format!("{text:?} is neither a time such as 2027-01-31T12:00:00Z nor a span such as 90d")
        })?,
    };
    ensure!(time > jiff::Timestamp::now(), "{time} is in the past");
    Ok(time.round(jiff::Unit::Second)?.to_string())
}

/// Runs `kiss-vdb keys`.
pub fn run(args: &KeysArgs) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match &args.verb {
        Verb::Create { name, rights, prefixes, collections, expires } => {
            let _one_at_a_time = lock(&args.file)?;
            let mut file = if args.file.exists() { read_file(&args.file)? } else { File::default() };
            ensure!(
                file.key.iter().all(|row| row.name != *name),
                "there is a key {name:?} already; revoke it first, or choose another name"
            );
            ensure!(file.key.len() < KEYS_MAX, "the file holds {KEYS_MAX} keys, which is the limit");
            let secret = new_secret()?;
            let list = |list: &Vec<String>| Some(list.clone()).filter(|list| !list.is_empty());
            let row = Row {
                name: name.clone(),
                sha256: encode_hex(&digest_of(&secret)),
                rights: rights.clone(),
                prefixes: list(prefixes),
                collections: list(collections),
                expires: expires.as_deref().map(expiry).transpose()?,
            };
            row.parse()?;
            file.key.push(row);
            // Before it is kept: a key that nobody was shown would hold its name for nobody.
            writeln!(out, "{secret}")?;
            out.flush()?;
            write_file(&args.file, &file)?;
            eprintln!("This is the only time it is shown. {} holds its SHA-256.", args.file.display());
        }
        Verb::List => {
            for row in read_file(&args.file)?.key {
                let (_, grant) = row.parse().with_context(|| format!("key {:?}", row.name))?;
                let rights: Vec<_> = grant.rights.iter().map(|right| format!("{right:?}").to_lowercase()).collect();
                let limits = grant.within.map_or_else(
                    || "everything".to_owned(),
                    |within| format!("prefixes {:?} collections {:?}", within.prefixes, within.collections),
                );
                let expires = row.expires.map_or_else(|| "never".to_owned(), |at| format!("expires {at}"));
                writeln!(out, "{} · {} · {limits} · {expires}", row.name, rights.join(","))?;
            }
        }
        Verb::Revoke { name } => {
            let _one_at_a_time = lock(&args.file)?;
            let mut file = read_file(&args.file)?;
            let before = file.key.len();
            file.key.retain(|row| row.name != *name);
            if file.key.len() == before {
                bail!("there is no key {name:?} in {}", args.file.display());
            }
            write_file(&args.file, &file)?;
            writeln!(out, "{name} is revoked")?;
        }
    }
    Ok(())
}

fn new_secret() -> anyhow::Result<String> {
    let mut bytes = [0; 32];
    SystemRandom::new().fill(&mut bytes).ok().context("the system gives no random numbers")?;
    Ok(format!("{SECRET_PREFIX}{}", base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(text: &str) -> Result<Keyring, Error> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys.toml");
        std::fs::write(&path, text).unwrap();
        Keyring::read(&path)
    }

    fn row(name: &str, secret: &str, more: &str) -> String {
        format!("[[key]]\nname = {name:?}\nsha256 = \"{}\"\n{more}\n", encode_hex(&digest_of(secret)))
    }

    #[test]
    fn a_key_is_found_by_its_secret_alone() {
        let ring = ring(&(row("a", "s1", "rights = [\"read\"]") + &row("b", "s2", "rights = [\"admin\"]"))).unwrap();
        assert_eq!(&*ring.find(&digest_of("s1")).unwrap().name, "a");
        assert_eq!(&*ring.find(&digest_of("s2")).unwrap().name, "b");
        assert!(ring.find(&digest_of("s3")).is_none());
        let mut almost = digest_of("s1");
        almost[31] ^= 1;
        assert!(ring.find(&almost).is_none(), "the whole digest counts");
    }

    #[test]
    fn files_that_leave_a_doubt_are_refused_by_name() {
        let read = "rights = [\"read\"]";
        for (name, text, says) in [
            ("twice the name", row("a", "1", read) + &row("a", "2", read), "name stands twice"),
            ("twice the secret", row("a", "1", read) + &row("b", "1", read), "secret stands twice"),
            ("no right", row("a", "1", "rights = []"), "rights"),
            ("unknown right", row("a", "1", "rights = [\"root\"]"), "root"),
            ("typo", row("a", "1", "rights = [\"read\"]\nprefix = [\"x\"]"), "prefix"),
            ("admin with limits", row("a", "1", "rights = [\"admin\"]\nprefixes = [\"x\"]"), "everything"),
            ("no such collection", row("a", "1", "rights = [\"read\"]\ncollections = [\"a/b\"]"), "collection"),
            ("bad time", row("a", "1", "rights = [\"read\"]\nexpires = \"soon\""), "expires"),
            ("bad digest", "[[key]]\nname = \"a\"\nsha256 = \"ab\"\nrights = [\"read\"]".into(), "64"),
        ] {
            let error = ring(&text).expect_err(name).to_string();
            assert!(error.contains(says), "{name}: {error}");
        }
    }

    #[test]
    fn limits_hold_what_they_name() {
        let within = Within { prefixes: vec!["jobs/".into()], collections: vec!["docs".into()] };
        for (key, inside) in [("jobs/1", true), ("jobs/", true), ("jobs", false), ("other", false), ("", false)] {
            assert_eq!(within.holds_key(key), inside, "{key}");
        }
        assert!(within.holds_collection("docs") && !within.holds_collection("docs2"));
        let wider = Within { prefixes: vec!["job".into()], collections: vec!["*".into()] };
        assert!(wider.holds(&within) && !within.holds(&wider));
        assert!(within.holds(&Within::default()), "nothing is within everything");
    }

    /// What changed is revoked, what did not keeps its streams.
    #[test]
    fn a_new_file_revokes_what_changed() {
        let read = "rights = [\"read\"]";
        let old = ring(&(row("a", "1", read) + &row("b", "2", read) + &row("c", "3", read))).unwrap();
        let grants: Vec<_> = ["1", "2", "3"].map(|s| Arc::clone(old.find(&digest_of(s)).unwrap())).into();
        let mut new = ring(&(row("a", "1", read) + &row("b", "2", "rights = [\"write\"]"))).unwrap();
        assert_eq!(new.replace(&old), 2);
        assert_eq!(grants.iter().map(|g| g.is_revoked()).collect::<Vec<_>>(), [false, true, true]);
        assert!(Arc::ptr_eq(&grants[0], new.find(&digest_of("1")).unwrap()));
        assert!(!new.find(&digest_of("2")).unwrap().is_revoked());
    }
}
