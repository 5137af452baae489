//! The one configuration: defaults < file < environment < flags, each value with where it came from.
//!
//! Every setting is a row of [`SETTINGS`]; nothing else of the server reads the environment (`NOTIFY_SOCKET`, systemd's,
//! aside). A bad value or an unknown name stops the start and names itself.

use crate::error::Error;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// One setting: its name in the file and as a flag (with dashes), its environment variable, default and meaning.
#[derive(Debug)]
pub struct Setting {
    /// In the file; as a flag with dashes for underscores.
    pub name: &'static str,
    /// The environment variable.
    pub env: &'static str,
    /// As text; empty = none.
    pub default: &'static str,
    /// For `--help`.
    pub help: &'static str,
}

const fn setting(name: &'static str, env: &'static str, default: &'static str, help: &'static str) -> Setting {
    Setting { name, env, default, help }
}

/// Every setting there is.
pub const SETTINGS: &[Setting] = &[
    setting("port", "PORT_RUST_KISS_VDB", "9917", "Port; 0 = any free port, printed"),
    setting(
        "bind_addr",
        "BIND_ADDR",
        "127.0.0.1",
        "Address to listen on; one that is not loopback needs a key, or --allow-open",
    ),
    setting("data_dir", "DATA_DIR", "./data", "Data directory"),
    setting("ephemeral", "EPHEMERAL", "false", "Keep everything in memory, nothing on disk"),
    setting("fsync", "FSYNC", "always", "always, interval or never"),
    setting("snapshot_interval", "SNAPSHOT_INTERVAL", "60", "Seconds between snapshots; 0 = only on shutdown"),
    setting("max_log_mb", "MAX_LOG_MB", "1024", "MiB of log kept for replay"),
    setting("max_memory_mb", "MAX_MEMORY_MB", "0", "Budget in MiB for keys and vectors; 0 = none"),
    setting("max_body_mb", "MAX_BODY_MB", "32", "Largest request body in MiB"),
    setting("max_connections", "MAX_CONNECTIONS", "20000", "Connections at a time"),
    setting("worker_threads", "WORKER_THREADS", "0", "Threads that serve requests; 0 = one for each core"),
    setting("stream_threads", "STREAM_THREADS", "0", "Threads that send to streams; 0 = one for every four cores"),
    setting(
        "api_key",
        "API_KEY",
        "",
        "Key every request but health needs; other users of this machine see flags, so prefer the environment",
    ),
    setting("keys_file", "KEYS_FILE", "", "File of named keys with rights and limits, made by kiss-vdb keys"),
    setting("allow_open", "ALLOW_OPEN", "false", "Allow an address that is not loopback without a key"),
    setting(
        "allowed_hosts",
        "ALLOWED_HOSTS",
        "",
        "Comma list of Host names an open server on loopback answers to, beside this machine's; * = any",
    ),
    setting("cors_origins", "CORS_ORIGINS", "", "Comma list of origins whose pages may call; * = any"),
    setting(
        "rate_limit",
        "RATE_LIMIT",
        "0",
        "Requests a second of one key, or without keys of one address; 0 = no limit",
    ),
    setting(
        "max_streams_per_client",
        "MAX_STREAMS_PER_CLIENT",
        "0",
        "Open streams of one key, or without keys of one address; 0 = no limit",
    ),
    setting(
        "max_connections_per_address",
        "MAX_CONNECTIONS_PER_ADDRESS",
        "0",
        "Open connections from one address; 0 = no limit",
    ),
    setting("tls_cert", "TLS_CERT", "", "File of the certificate chain as PEM; with --tls-key the server speaks HTTPS"),
    setting("tls_key", "TLS_KEY", "", "File of the private key of the certificate as PEM"),
    setting(
        "slow_request_ms",
        "SLOW_REQUEST_MS",
        "1000",
        "Requests that take longer than so many milliseconds are logged; 0 = none",
    ),
    setting("log_format", "LOG_FORMAT", "text", "text, or json for machines"),
    setting("log_level", "RUST_LOG", "info", "A tracing filter such as info or kiss_vdb=debug"),
];

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Built in.
    Default,
    /// The configuration file.
    File(PathBuf),
    /// The environment variable of that name.
    Environment(&'static str),
    /// A flag on the command line.
    Flag,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Environment(name) => write!(f, "environment {name}"),
            Self::Flag => f.write_str("flag"),
        }
    }
}

/// When an acknowledged write is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fsync {
    /// Before it is acknowledged; writes that wait share one sync.
    Always,
    /// Within a second.
    Interval,
    /// When the operating system writes it back.
    Never,
}

impl Fsync {
    /// The setting's word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::Interval => "interval",
            Self::Never => "never",
        }
    }
}

/// The settings as the program uses them.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "each field is the setting of its name in SETTINGS")]
pub struct Config {
    pub port: u16,
    pub bind_addr: IpAddr,
    /// `None` = ephemeral.
    pub data_dir: Option<PathBuf>,
    pub fsync: Fsync,
    pub snapshot_interval_s: u64,
    pub max_log_bytes: u64,
    pub max_memory_bytes: usize,
    pub max_body_bytes: usize,
    pub max_connections: usize,
    pub worker_threads: usize,
    pub stream_threads: usize,
    pub api_key: Option<String>,
    pub keys_file: Option<PathBuf>,
    pub allowed_hosts: Vec<String>,
    pub cors_origins: Vec<String>,
    pub rate_limit: u32,
    pub max_streams_per_client: u32,
    pub max_connections_per_address: u32,
    /// Certificate chain and private key.
    pub tls: Option<(PathBuf, PathBuf)>,
    pub slow_request: Option<Duration>,
    pub log_json: bool,
    pub log_level: String,
}

impl Config {
    /// Whether callers have to say who they are.
    #[must_use]
    pub fn needs_key(&self) -> bool {
        self.api_key.is_some() || self.keys_file.is_some()
    }
}

/// Every setting's text and where it came from.
#[derive(Clone, Debug)]
pub struct Resolved(BTreeMap<&'static str, (String, Source)>);

impl Resolved {
    /// Collects the settings. `flags` are name and text; `file` is the `--config` path, else `kiss-vdb.toml` if it exists.
    pub fn collect(
        file: Option<PathBuf>,
        environment: impl Fn(&str) -> Option<OsString>,
        flags: impl IntoIterator<Item = (&'static str, String)>,
    ) -> Result<Self, Error> {
        let mut values: BTreeMap<_, _> =
            SETTINGS.iter().map(|s| (s.name, (s.default.to_owned(), Source::Default))).collect();
        let named = file.is_some();
        let path = file.unwrap_or_else(|| PathBuf::from("kiss-vdb.toml"));
        match std::fs::read_to_string(&path) {
            Ok(text) => {
                for (name, value) in parse_file(&path, &text)? {
                    values.insert(name, (value, Source::File(path.clone())));
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !named => {}
            Err(e) => return Err(Error::io("cannot read the configuration file", &path)(e)),
        }
        for setting in SETTINGS {
            // An empty variable is what shells and compose files make of an unset one.
            if let Some(value) = environment(setting.env).filter(|v| !v.is_empty()) {
                // Taken for unset, it would leave a server open, or in another directory.
                let value = value.into_string().map_err(|_| {
                    Error::Config(format!("{} (environment) is not UTF-8: write it in UTF-8, or unset it", setting.env))
                })?;
                values.insert(setting.name, (value, Source::Environment(setting.env)));
            }
        }
        for (name, value) in flags {
            values.insert(name, (value, Source::Flag));
        }
        Ok(Self(values))
    }

    /// The settings in order: name, text (a key is not shown), source.
    pub fn rows(&self) -> impl Iterator<Item = (&'static str, &str, &Source)> {
        SETTINGS.iter().map(|s| {
            let (value, source) = &self.0[s.name];
            let shown = if s.name == "api_key" && !value.is_empty() { "(set)" } else { value.as_str() };
            (s.name, shown, source)
        })
    }

    fn bad(&self, name: &str, takes: &str) -> Error {
        let (value, source) = &self.0[name];
        Error::Config(format!("{name} = {value:?} ({source}) is not valid: it takes {takes}"))
    }

    /// Half of a certificate and its key.
    fn lone(&self, name: &str, other: &str) -> Error {
        let (value, source) = &self.0[name];
        Error::Config(format!(
            "{name} = {value:?} ({source}) is set, and {other} is not: HTTPS needs both; leave out both for plain HTTP"
        ))
    }

    fn text(&self, name: &str) -> &str {
        &self.0[name].0
    }

    fn parse<T: std::str::FromStr>(&self, name: &str, takes: &str) -> Result<T, Error> {
        self.text(name).trim().parse().map_err(|_| self.bad(name, takes))
    }

    fn flag(&self, name: &str) -> Result<bool, Error> {
        match self.text(name).trim() {
            "true" | "1" | "yes" => Ok(true),
            "false" | "0" | "no" => Ok(false),
            _ => Err(self.bad(name, "true or false")),
        }
    }

    fn mebibytes(&self, name: &str, range: std::ops::RangeInclusive<u64>) -> Result<u64, Error> {
        let takes = format!("a whole number of MiB from {} to {}", range.start(), range.end());
        let n: u64 = self.parse(name, &takes)?;
        if range.contains(&n) { Ok(n << 20) } else { Err(self.bad(name, &takes)) }
    }

    /// Checks every value and what must hold between them.
    pub fn build(&self) -> Result<Config, Error> {
        let to_usize = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let config = Config {
            port: self.parse("port", "a port number from 0 to 65535")?,
            bind_addr: self.parse("bind_addr", "an IP address such as 127.0.0.1 or 0.0.0.0")?,
            data_dir: if self.flag("ephemeral")? { None } else { Some(self.data_dir()?) },
            fsync: match self.text("fsync").trim() {
                "always" => Fsync::Always,
                "interval" => Fsync::Interval,
                "never" => Fsync::Never,
                _ => return Err(self.bad("fsync", "always, interval or never")),
            },
            snapshot_interval_s: self.parse("snapshot_interval", "a whole number of seconds; 0 = only on shutdown")?,
            max_log_bytes: self.mebibytes("max_log_mb", 1..=1 << 24)?,
            max_memory_bytes: to_usize(self.mebibytes("max_memory_mb", 0..=1 << 24)?),
            max_body_bytes: to_usize(self.mebibytes("max_body_mb", 1..=256)?),
            max_connections: self.parse("max_connections", "a whole number")?,
            worker_threads: self.parse("worker_threads", "a whole number; 0 = one for each core")?,
            stream_threads: match self.parse("stream_threads", "a whole number; 0 = one for every four cores")? {
                0 => std::thread::available_parallelism().map_or(1, |cores| cores.get().div_ceil(4)),
                threads => threads,
            },
            api_key: Some(self.text("api_key").trim().to_owned()).filter(|k| !k.is_empty()),
            keys_file: self.path("keys_file"),
            allowed_hosts: self.list("allowed_hosts"),
            cors_origins: self.list("cors_origins"),
            rate_limit: self.parse("rate_limit", "a whole number; 0 = no limit")?,
            max_streams_per_client: self.parse("max_streams_per_client", "a whole number; 0 = no limit")?,
            max_connections_per_address: self.parse("max_connections_per_address", "a whole number; 0 = no limit")?,
            tls: match (self.path("tls_cert"), self.path("tls_key")) {
                (None, None) => None,
                (Some(cert), Some(key)) => Some((cert, key)),
                (None, Some(_)) => return Err(self.lone("tls_key", "tls_cert (TLS_CERT, --tls-cert)")),
                (Some(_), None) => return Err(self.lone("tls_cert", "tls_key (TLS_KEY, --tls-key)")),
            },
            slow_request: Some(self.parse("slow_request_ms", "a whole number of milliseconds; 0 = none")?)
                .filter(|ms| *ms > 0)
                .map(Duration::from_millis),
            log_json: match self.text("log_format").trim() {
                "text" => false,
                "json" => true,
                _ => return Err(self.bad("log_format", "text or json")),
            },
            log_level: self.text("log_level").to_owned(),
        };
        if config.api_key.as_ref().is_some_and(|key| !key.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic())) {
            return Err(Error::Config("api_key takes printable ASCII: it travels in a header".into()));
        }
        for name in ["api_key", "keys_file"] {
            let (value, source) = &self.0[name];
            if *source != Source::Default && value.trim().is_empty() {
                // A secret that was not there: without this the server would be open.
                return Err(self.bad(name, "some text; leave it out for a server without a key"));
            }
        }
        if config.max_connections == 0 {
            return Err(self.bad("max_connections", "at least 1"));
        }
        if config.worker_threads > 1024 {
            return Err(self.bad("worker_threads", "at most 1024; 0 = one for each core"));
        }
        if config.stream_threads > 1024 {
            return Err(self.bad("stream_threads", "at most 1024; 0 = one for every four cores"));
        }
        if !config.cors_origins.iter().all(|origin| origin == ANY || is_origin(origin)) {
            let takes = "origins as browsers send them, such as https://app.example or http://localhost:5173, in small letters \
                and without a path or wildcards, with commas between, or *";
            return Err(self.bad("cors_origins", takes));
        }
        if config.allowed_hosts.iter().any(|host| host != ANY && host.contains(['/', ':', ' ', '*'])) {
            return Err(
                self.bad("allowed_hosts", "names such as app.example, without scheme and port, with commas between")
            );
        }
        if !config.bind_addr.is_loopback() && !config.needs_key() && !self.flag("allow_open")? {
            return Err(Error::Config(format!(
                "bind_addr = {} can be reached from other machines, and no key is set: set API_KEY or KEYS_FILE, or ALLOW_OPEN=true if that is what you want",
                config.bind_addr
            )));
        }
        self.flag("allow_open")?;
        Ok(config)
    }

    /// The items of a comma list.
    fn list(&self, name: &str) -> Vec<String> {
        self.text(name).split(',').map(|item| item.trim().to_owned()).filter(|item| !item.is_empty()).collect()
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        Some(self.text(name).trim()).filter(|path| !path.is_empty()).map(PathBuf::from)
    }

    fn data_dir(&self) -> Result<PathBuf, Error> {
        let text = self.text("data_dir");
        if text.is_empty() { Err(self.bad("data_dir", "a path")) } else { Ok(PathBuf::from(text)) }
    }
}

/// In a list, for all there are.
const ANY: &str = "*";

/// Whether a browser could name a page's origin so: the comparison is of bytes.
fn is_origin(text: &str) -> bool {
    let is_scheme =
        |scheme: &str| scheme.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b));
    let is_place =
        |place: &str| place.bytes().all(|b| b.is_ascii_graphic() && !b.is_ascii_uppercase() && !b"/?#@,*".contains(&b));
    text.split_once("://")
        .is_some_and(|(scheme, place)| !scheme.is_empty() && !place.is_empty() && is_scheme(scheme) && is_place(place))
}

fn parse_file(path: &std::path::Path, text: &str) -> Result<Vec<(&'static str, String)>, Error> {
    let table: toml::Table = text.parse().map_err(|e| Error::Config(format!("{}: {e}", path.display())))?;
    let mut values = Vec::new();
    for (name, value) in table {
        let setting = SETTINGS.iter().find(|s| s.name == name).ok_or_else(|| {
            let known: Vec<_> = SETTINGS.iter().map(|s| s.name).collect();
            Error::Config(format!("{}: unknown setting {name:?}; there are {}", path.display(), known.join(", ")))
        })?;
        let value = match value {
            toml::Value::String(text) => text,
            toml::Value::Integer(n) => n.to_string(),
            toml::Value::Boolean(b) => b.to_string(),
            toml::Value::Array(list) if list.iter().all(toml::Value::is_str) => {
                list.iter().filter_map(|v| v.as_str()).collect::<Vec<_>>().join(",")
            }
            _ => {
                return Err(Error::Config(format!(
                    "{}: {name} takes a text, a whole number or true/false",
                    path.display()
                )));
            }
        };
        values.push((setting.name, value));
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(file: &str, environment: &[(&str, &str)], flags: &[(&'static str, &str)]) -> Result<Resolved, Error> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, file).unwrap();
        let flags = flags.iter().map(|(n, v)| (*n, (*v).to_owned()));
        let environment = |name: &str| environment.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).into());
        Resolved::collect(Some(path), environment, flags)
    }

    #[test]
    fn a_variable_that_is_no_text_is_refused_by_name() {
        use std::os::unix::ffi::OsStringExt;
        let environment = |name: &str| (name == "API_KEY").then(|| OsString::from_vec(vec![b'p', 0xe4]));
        let error = Resolved::collect(Some("/dev/null".into()), environment, []).unwrap_err().to_string();
        assert!(error.contains("API_KEY") && error.contains("UTF-8"), "{error}");
    }

    #[test]
    fn flags_beat_the_environment_which_beats_the_file_which_beats_the_default() {
        let port = |file, environment: &[(&str, &str)], flags: &[(&'static str, &str)]| {
            resolve(file, environment, flags).unwrap().build().unwrap().port
        };
        let env = [("PORT_RUST_KISS_VDB", "2")];
        assert_eq!(port("", &[], &[]), 9917);
        assert_eq!(port("port = 1", &[], &[]), 1);
        assert_eq!(port("port = 1", &env, &[]), 2);
        assert_eq!(port("port = 1", &env, &[("port", "3")]), 3);
        assert_eq!(port("port = 1", &[("PORT_RUST_KISS_VDB", "")], &[]), 1, "an empty variable is an unset one");
    }

    #[test]
    fn a_bad_value_names_itself_and_where_it_came_from() {
        for (name, file, environment, says) in [
            ("unknown name", "prot = 1", None, "prot"),
            ("not toml", "port =", None, "c.toml"),
            ("bad port", "port = 70000", None, "port"),
            ("bad word", "", Some(("FSYNC", "sometimes")), "environment FSYNC"),
            ("bad number", "", Some(("MAX_LOG_MB", "lots")), "max_log_mb"),
            ("log too small", "max_log_mb = 0", None, "max_log_mb"),
            ("bad origin", "cors_origins = \"example.com\"", None, "cors_origins"),
            ("an origin with a path", "cors_origins = \"http://a.example/\"", None, "cors_origins"),
            ("an origin no browser sends", "cors_origins = \"http://A.example\"", None, "cors_origins"),
            ("some of many origins", "cors_origins = \"https://*.a.example\"", None, "cors_origins"),
            ("some of many hosts", "allowed_hosts = \"*.a.example\"", None, "allowed_hosts"),
            ("a host with a scheme", "allowed_hosts = \"http://a.example\"", None, "allowed_hosts"),
            ("a blank key", "api_key = \" \"", None, "api_key"),
            ("a key that was not there", "", Some(("API_KEY", "  ")), "environment API_KEY"),
            ("a key file that was not there", "keys_file = \"\"", None, "keys_file"),
            ("open to the world", "bind_addr = \"0.0.0.0\"", None, "API_KEY"),
            ("a key that no header carries", "api_key = \"\u{f1}\"", None, "printable ASCII"),
            ("bad flag", "allow_open = \"maybe\"", None, "allow_open"),
        ] {
            let environment: Vec<_> = environment.into_iter().collect();
            let error = resolve(file, &environment, &[]).and_then(|r| r.build()).expect_err(name);
            assert!(error.to_string().contains(says), "{name}: {error}");
        }
    }

    #[test]
    fn a_foreign_address_starts_with_a_key_or_on_request() {
        let build = |file| resolve(file, &[], &[]).unwrap().build();
        assert!(build("bind_addr = \"0.0.0.0\"\napi_key = \"k\"").is_ok());
        assert!(build("bind_addr = \"0.0.0.0\"\nallow_open = true").is_ok());
        assert!(build("bind_addr = \"::1\"").is_ok());
    }
}
