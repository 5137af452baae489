//! Who asks: keys, tokens, limits by caller, and what browsers must not do for strangers.
//!
//! ```text
//! request ─▶ Host, Origin (open servers) ─▶ key or token ─▶ rate ─▶ route ─▶ handler: rights to this key, collection
//! ```
//! A server is *open* when it has neither `API_KEY` nor `KEYS_FILE`. Then any page in a browser on the same machine could
//! call it, so on loopback the `Host` must not be a name that an attacker's DNS could have pointed here (DNS rebinding),
//! a write may not come from a page of another origin, and a page of another site may not load a part from here, which
//! would tell it what there is. With a key neither is needed: browsers do not add it by
//! themselves.
//!
//! Locks: `keyring` (readers for a look-up; once a second at most to replace it), `streams` and `connections` (counts by
//! client, held for a look-up, and not at all without a limit). governor's limiter brings its own.

use super::answer::json;
use super::error::{ApiError, ApiResult};
use super::extract::{Fields, Head, Params, Payload, parse_object, read_json};
use super::{App, EVENTS_ROUTE, is_about_server};
use crate::config::Config;
use crate::error::{Error, Rejection};
use crate::keys::{Digest, Grant, Keyring, Right, Within, digest_of, place_of};
use axum::extract::State;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use governor::clock::{Clock as _, DefaultClock};
use governor::state::keyed::HashMapStateStore;
use governor::{Quota, RateLimiter};
use parking_lot::{Mutex, RwLock};
use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// How often the key file is looked at.
const KEYS_POLL: Duration = Duration::from_secs(1);
/// How long a token lives when the client does not say.
const TOKEN_TTL_MS: u64 = 300_000;
/// The longest a token may live: whoever sees a page's URL has it.
const TOKEN_TTL_MS_MAX: u64 = 24 * 3_600_000;
/// Longest token: it has to fit into a request's head.
const TOKEN_BYTES_MAX: usize = 32 << 10;

/// Who a limit counts for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Client {
    /// Whoever has this key.
    Key(Box<str>),
    /// Whoever comes from there. Of an IPv6 address the first half: the rest is the client's to choose.
    Address(IpAddr),
}

/// `https://host:port` of an address that begins so.
fn origin_of(url: &str) -> &str {
    url.match_indices('/').nth(2).map_or(url, |(end, _)| &url[..end])
}

/// The part of an address that limits count by.
#[must_use]
pub fn counted_address(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() & !u128::from(u64::MAX)).into()),
        v4 => v4,
    }
}

type Limiter = RateLimiter<Client, HashMapStateStore<Client>, DefaultClock>;

/// What is needed to know who asks. See the module.
#[derive(Debug)]
pub struct Auth {
    /// `None` on an open server.
    keyring: Option<RwLock<Keyring>>,
    api_key: Option<Digest>,
    keys_file: Option<PathBuf>,
    /// The file as it was just before it was read.
    keys_stamp: Option<Stamp>,
    token_key: hmac::Key,
    hosts: Hosts,
    origins: Vec<String>,
    limiter: Option<Limiter>,
    streams: Mutex<HashMap<Client, u32>>,
    streams_max: u32,
    connections: Mutex<HashMap<IpAddr, u32>>,
    connections_max: u32,
}

/// Whose names a request may be for.
#[derive(Debug)]
enum Hosts {
    Any,
    /// Those that nobody else can point here, and these.
    Loopback(Vec<String>),
}

impl Auth {
    /// As configured. Reads the key file.
    pub fn new(config: &Config) -> Result<Self, Error> {
        let mut auth = Self {
            keyring: None,
            api_key: config.api_key.as_deref().map(digest_of),
            keys_file: config.keys_file.clone(),
            keys_stamp: config.keys_file.as_deref().and_then(stamp),
            token_key: token_key(config.data_dir.as_deref())?,
            hosts: if config.bind_addr.is_loopback() && !config.allowed_hosts.iter().any(|h| h == "*") {
                Hosts::Loopback(config.allowed_hosts.clone())
            } else {
                Hosts::Any
            },
            origins: config.cors_origins.clone(),
            limiter: NonZeroU32::new(config.rate_limit).map(|rate| {
                RateLimiter::new(Quota::per_second(rate), HashMapStateStore::default(), DefaultClock::default())
            }),
            streams: Mutex::default(),
            streams_max: config.max_streams_per_client,
            connections: Mutex::default(),
            connections_max: config.max_connections_per_address,
        };
        if auth.api_key.is_some() || auth.keys_file.is_some() {
            let keyring = auth.read_keys()?;
            if keyring.is_empty() {
                tracing::warn!("the key file holds no key, so nobody is let in; make one with kiss-vdb keys create");
            }
            auth.keyring = Some(RwLock::new(keyring));
        }
        Ok(auth)
    }

    /// Whether anybody may do anything.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.keyring.is_none()
    }

    fn read_keys(&self) -> Result<Keyring, Error> {
        let mut keyring = self.keys_file.as_deref().map(Keyring::read).transpose()?.unwrap_or_default();
        if let Some(digest) = self.api_key {
            keyring.add(digest, Grant::everything());
        }
        Ok(keyring)
    }

    /// Takes over a changed key file, once a second, and forgets clients that limits need not remember. Never ends.
    pub async fn keep_fresh(app: App) {
        let auth = &app.auth;
        // What was read, and what could not be: that is tried again every second, and told once.
        let mut seen = auth.keys_stamp;
        let mut told = seen;
        loop {
            tokio::time::sleep(KEYS_POLL).await;
            if let Some(limiter) = &auth.limiter {
                limiter.retain_recent();
            }
            let (Some(path), Some(keyring)) = (&auth.keys_file, &auth.keyring) else { continue };
            let now = stamp(path);
            if now == seen {
                continue;
            }
            match auth.read_keys() {
                Ok(mut new) => {
                    seen = now;
                    let revoked = {
                        let mut keyring = keyring.write();
                        let revoked = new.replace(&keyring);
                        *keyring = new;
                        revoked
                    };
                    tracing::info!(revoked, "the key file has changed");
                    app.engine.feed().wake_all();
                }
                Err(_) if told == now => {}
                Err(error) => {
                    told = now;
                    tracing::error!(%error, "the key file has changed and cannot be used; the keys stay as they were")
                }
            }
        }
    }

    /// Whether a request may pass, before anybody asks who sent it.
    pub fn check_browser(&self, Head { method, headers, uri, .. }: &Head) -> ApiResult<()> {
        // Whoever reads the first and whoever reads the last would see two requests (RFC 9112, 3.2).
        let mut hosts = headers.all(header::HOST);
        let host = hosts.next();
        if hosts.next().is_some() {
            return Err(Rejection::invalid("a request has one Host").into());
        }
        if !self.is_open() {
            return Ok(());
        }
        // Over HTTP/2 the host stands in the target.
        let host = uri.authority().map(|a| a.as_str()).or_else(|| host?.to_str().ok());
        if let (Hosts::Loopback(names), Some(host)) = (&self.hosts, host.filter(|host| !is_loopback(host))) {
            let name = without_port(host);
            if !is_beyond_dns(name) && !names.iter().any(|n| n.eq_ignore_ascii_case(name)) {
                return Err(Rejection::Forbidden(format!(
                    "the Host {name:?} is not known here; if it is a proxy's, name it in ALLOWED_HOSTS, or set a key"
                ))
                .into());
            }
        }
        let only_reads = matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS);
        let is_about_server = is_about_server(uri.path());
        let fetch = |name| headers.first(HeaderName::from_static(name)).map_or(&[][..], HeaderValue::as_bytes);
        let referring = || headers.first(header::REFERER).and_then(|url| url.to_str().ok()).map_or("", origin_of);
        let origin = match headers.first(header::ORIGIN) {
            // Its page is shown nothing of what only reads; a backup costs all the same.
            Some(_) if only_reads && !is_about_server => return Ok(()),
            Some(origin) => origin.to_str().unwrap_or_default(),
            // A picture or a frame in a page of another site comes without Origin. Its page sees none of it, but whether it was there.
            // A link to the console that was followed leaves the page.
            None => match fetch("sec-fetch-site") {
                b"cross-site" if fetch("sec-fetch-dest") == b"document" && !uri.path().starts_with("/v1/") => {
                    return Ok(());
                }
                b"cross-site" => referring(),
                // Another port of this machine, say.
                b"same-site" if is_about_server => referring(),
                _ => return Ok(()),
            },
        };
        let is_own =
            origin.split_once("://").is_some_and(|(_, place)| host.is_some_and(|h| h.eq_ignore_ascii_case(place)));
        if is_own || self.origins.iter().any(|o| o == origin || o == "*") {
            return Ok(());
        }
        let what = if only_reads { "look" } else { "write" };
        Err(Rejection::Forbidden(format!("pages of {origin:?} may not {what} here; list it in CORS_ORIGINS")).into())
    }

    /// Whose request it is; `None` on an open server.
    pub fn identify(&self, head: &Head, now_ms: impl Fn() -> u64) -> ApiResult<Option<Arc<Grant>>> {
        let Some(keyring) = &self.keyring else { return Ok(None) };
        if let Some(secret) = bearer(&head.headers) {
            let found = keyring.read().find(&digest_of(secret)).cloned();
            let grant = found.ok_or(ApiError::Unauthorized("the key is not known"))?;
            if grant.is_expired(now_ms()) {
                return Err(ApiError::Unauthorized("the key has expired"));
            }
            return Ok(Some(grant));
        }
        // In a URL, which proxies log and browsers remember, only what is short-lived and for this route is taken.
        if head.uri.path() == EVENTS_ROUTE && matches!(head.method, Method::GET | Method::HEAD) {
            let query = head.uri.query().unwrap_or_default();
            if let Some((_, token)) = form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "access_token")
            {
                return self.check_token(&token, now_ms()).map(|grant| Some(Arc::new(grant)));
            }
        }
        Err(ApiError::Unauthorized("this server needs a key: send Authorization: Bearer <key>"))
    }

    /// Takes one request off what its sender may ask in a second.
    pub fn check_rate(&self, client: &Client) -> ApiResult<()> {
        let Some(limiter) = &self.limiter else { return Ok(()) };
        limiter.check_key(client).map_err(|not_until| {
            let wait = not_until.wait_time_from(DefaultClock::default().now());
            ApiError::RateLimited { what: "requests a second", retry_after_s: wait.as_secs() + 1 }
        })
    }

    /// Whether streams are counted by client.
    #[must_use]
    pub fn counts_streams(&self) -> bool {
        self.streams_max > 0
    }

    /// A place for one more stream of this client, held as long as the stream lives; `None` without a limit.
    pub fn stream_place(app: &App, client: Client) -> ApiResult<Option<Box<StreamPlace>>> {
        let auth = &app.auth;
        if auth.streams_max == 0 {
            return Ok(None);
        }
        let mut streams = auth.streams.lock();
        let count = streams.entry(client.clone()).or_insert(0);
        if *count >= auth.streams_max {
            return Err(ApiError::RateLimited { what: "streams at a time", retry_after_s: 1 });
        }
        *count += 1;
        drop(streams);
        Ok(Some(Box::new(StreamPlace { app: app.clone(), client })))
    }

    /// A place for one more connection from there: the address to give back when it is gone, `None` without a limit, an
    /// error when there is no place.
    pub fn connection_place(&self, peer: IpAddr) -> Result<Option<IpAddr>, NoPlace> {
        if self.connections_max == 0 {
            return Ok(None);
        }
        let address = counted_address(peer);
        let mut connections = self.connections.lock();
        let count = connections.entry(address).or_insert(0);
        if *count >= self.connections_max {
            return Err(NoPlace);
        }
        *count += 1;
        Ok(Some(address))
    }

    /// Gives a connection's place back.
    pub fn connection_gone(&self, address: IpAddr) {
        release(&mut self.connections.lock(), &address);
    }

    fn make_token(&self, claims: &Claims) -> Option<String> {
        let payload = serde_json::to_vec(claims).ok()?;
        let signature = hmac::sign(&self.token_key, &payload);
        Some(format!("{}.{}", URL_SAFE_NO_PAD.encode(payload), URL_SAFE_NO_PAD.encode(signature)))
    }

    /// What a token grants. Its key must still be there, and still reach what the token names.
    fn check_token(&self, token: &str, now_ms: u64) -> ApiResult<Grant> {
        let claims =
            self.read_token(token).ok_or(ApiError::Unauthorized("the access token is not one of this server's"))?;
        if claims.expires_at_ms <= now_ms {
            return Err(ApiError::Unauthorized("the access token has expired; get another with POST /v1/token"));
        }
        let gone = ApiError::Unauthorized("the key this access token was made with is gone or has changed");
        let keyring = self.keyring.as_ref().map(|keyring| keyring.read());
        let Some(grant) = keyring.as_ref().and_then(|k| k.find_by_place(&claims.place, &claims.name)) else {
            return Err(gone);
        };
        let still_reaches = match (&grant.within, &claims.within) {
            (None, _) => true,
            (Some(limits), Some(within)) => limits.holds(within),
            (Some(_), None) => false,
        };
        if grant.is_expired(now_ms) || grant.need(Right::Read).is_err() || !still_reaches {
            return Err(gone);
        }
        Ok(grant.narrowed(vec![Right::Read], claims.within, claims.expires_at_ms))
    }

    fn read_token(&self, token: &str) -> Option<Claims> {
        if token.len() > TOKEN_BYTES_MAX {
            return None;
        }
        let (payload, signature) = token.split_once('.')?;
        let payload = URL_SAFE_NO_PAD.decode(payload).ok()?;
        // Compares in constant time.
        hmac::verify(&self.token_key, &payload, &URL_SAFE_NO_PAD.decode(signature).ok()?).ok()?;
        serde_json::from_slice(&payload).ok()
    }
}

/// An address has as many connections as it may.
#[derive(Debug)]
pub struct NoPlace;

/// One of the streams a client may have.
#[derive(Debug)]
pub struct StreamPlace {
    app: App,
    client: Client,
}

impl Drop for StreamPlace {
    fn drop(&mut self) {
        release(&mut self.app.auth.streams.lock(), &self.client);
    }
}

/// Counts one less; who has none is forgotten.
fn release<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, u32>, of: &K) {
    if let Some(count) = counts.get_mut(of) {
        *count -= 1;
        if *count == 0 {
            counts.remove(of);
        }
    }
}

/// What a token says. Signed, not secret.
#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    /// The beginning of its key's digest,
    place: [u8; 8],
    /// and that key's name.
    name: Box<str>,
    within: Option<Within>,
    expires_at_ms: u64,
}

/// What tokens are signed with: kept with the data, so that streams come back after a restart.
fn token_key(data_dir: Option<&Path>) -> Result<hmac::Key, Error> {
    let no_random = |_| Error::Config("the system gives no random numbers".into());
    let mut secret = [0; 32];
    SystemRandom::new().fill(&mut secret).map_err(no_random)?;
    if let Some(dir) = data_dir {
        let path = dir.join("token.key");
        match std::fs::read(&path) {
            Ok(bytes) if bytes.len() == secret.len() => secret.copy_from_slice(&bytes),
            // Made anew it would end all tokens.
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("cannot read", &path)(error));
            }
            _ => write_secret(dir, &path, &secret).map_err(Error::io("cannot write", &path))?,
        }
    }
    Ok(hmac::Key::new(hmac::HMAC_SHA256, &secret))
}

/// Written beside and renamed; readable by its owner alone. Losing it in a crash costs a few new tokens.
fn write_secret(dir: &Path, path: &Path, secret: &[u8]) -> std::io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    std::io::Write::write_all(&mut file, secret)?;
    file.persist(path)?;
    Ok(())
}

/// What tells that a file is another than before: when its bytes and when its owner or mode changed, its length and number.
pub(super) type Stamp = (SystemTime, (i64, i64), u64, u64);

pub(super) fn stamp(path: &Path) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt;
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.modified().ok()?, (meta.ctime(), meta.ctime_nsec()), meta.len(), meta.ino()))
}

fn bearer(headers: &Fields) -> Option<&str> {
    let value = headers.first(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

fn without_port(host: &str) -> &str {
    let end = if host.starts_with('[') { host.find(']').map(|at| at + 1) } else { host.find(':') };
    end.map_or(host, |end| &host[..end])
}

/// The name that nearly every request on loopback is for, seen without taking it apart.
fn is_loopback(host: &str) -> bool {
    host.strip_prefix("127.0.0.1").is_some_and(|port| port.is_empty() || port.starts_with(':'))
}

/// Whether nobody's DNS decides where this name leads: an address, a name without a dot (a machine of this network), or
/// one below localhost, which browsers resolve themselves.
fn is_beyond_dns(name: &str) -> bool {
    let address = name.strip_prefix('[').and_then(|n| n.strip_suffix(']')).unwrap_or(name);
    !name.contains('.') || address.parse::<IpAddr>().is_ok() || name.to_ascii_lowercase().ends_with(".localhost")
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenBody {
    ttl_ms: Option<u64>,
    prefixes: Option<Vec<String>>,
    collections: Option<Vec<String>>,
}

#[derive(Serialize)]
struct TokenAnswer<'a> {
    token: String,
    expires_at_ms: u64,
    /// Nothing on an open server: everybody may do everything.
    #[serde(skip_serializing_if = "Option::is_none")]
    grant: Option<GrantAnswer<'a>>,
}

/// What the caller's key may do, in the words of the key file: a page shows what it reaches and offers what it may.
#[derive(Serialize)]
struct GrantAnswer<'a> {
    name: &'a str,
    rights: &'a [Right],
    /// `prefixes` and `collections`; neither for a key that reaches everything.
    #[serde(flatten)]
    within: Option<&'a Within>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at_ms: Option<u64>,
}

/// `POST /v1/token`
pub async fn token(State(app): State<App>, head: Head, body: Payload) -> ApiResult {
    Params::parse(&head.uri, &[])?;
    let bytes = read_json(&head.headers, body, TOKEN_BYTES_MAX).await?;
    let body: TokenBody = if bytes.is_empty() { TokenBody::default() } else { parse_object(&bytes)? };
    let ttl_ms = body.ttl_ms.unwrap_or(TOKEN_TTL_MS);
    if !(1000..=TOKEN_TTL_MS_MAX).contains(&ttl_ms) {
        return Err(Rejection::invalid(format!("ttl_ms is 1000 to {TOKEN_TTL_MS_MAX} (a day)")).into());
    }
    let asked = (body.prefixes.is_some() || body.collections.is_some()).then(|| Within {
        prefixes: body.prefixes.unwrap_or_default(),
        collections: body.collections.unwrap_or_default(),
    });
    if let Some(asked) = &asked {
        asked.check()?;
    }
    let expires_at_ms = app.engine.now_ms() + ttl_ms;
    let (place, grant) = match (&head.grant, bearer(&head.headers)) {
        (Some(grant), Some(secret)) => (place_of(&digest_of(secret)), grant.as_ref().clone()),
        // On an open server a token is worth nothing, and whoever asks for one need not know that.
        _ => ([0; 8], Grant::everything()),
    };
    grant.need(Right::Read)?;
    let within = match (&grant.within, asked) {
        (Some(limits), Some(asked)) if !limits.holds(&asked) => {
            return Err(Rejection::Forbidden(format!(
                "the key {:?} reaches less than that: a token has its key's rights or fewer",
                grant.name
            ))
            .into());
        }
        (limits, asked) => asked.or_else(|| limits.clone()),
    };
    let narrowed = grant.narrowed(vec![Right::Read], within.clone(), expires_at_ms);
    let expires_at_ms = narrowed.expires_at_ms.unwrap_or(expires_at_ms);
    let names = within.iter().flat_map(|w| w.prefixes.iter().chain(&w.collections)).map(String::len).sum::<usize>();
    if 2 * names > TOKEN_BYTES_MAX {
        return Err(Rejection::invalid(format!(
            "prefixes and collections together are at most {} bytes",
            TOKEN_BYTES_MAX / 2
        ))
        .into());
    }
    let token =
        app.auth.make_token(&Claims { place, name: grant.name, within, expires_at_ms }).ok_or(ApiError::Internal)?;
    let grant = head.grant.as_deref().map(|grant| GrantAnswer {
        name: &grant.name,
        rights: &grant.rights,
        within: grant.within.as_ref(),
        expires_at_ms: grant.expires_at_ms,
    });
    let answer = serde_json::to_string(&TokenAnswer { token, expires_at_ms, grant });
    Ok(json(StatusCode::CREATED, answer.map_err(|_| ApiError::Internal)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_an_attacker_can_point_here_are_told_from_others() {
        for (host, ours) in [
            ("localhost", true),
            ("LOCALHOST:9917", true),
            ("127.0.0.1:9917", true),
            ("127.9.9.9", true),
            ("[::1]:9917", true),
            ("app.localhost:1", true),
            ("evil.example", false),
            ("127.0.0.1.evil.example", false),
            ("localhost.evil.example:9917", false),
            ("192.168.0.7:9917", true),
            ("db:9917", true),
            ("evil.:9917", false),
        ] {
            assert_eq!(is_beyond_dns(without_port(host)), ours, "{host}");
        }
    }

    #[test]
    fn addresses_count_by_what_a_client_cannot_choose() {
        let counted = |text: &str| counted_address(text.parse().unwrap()).to_string();
        assert_eq!(counted("10.1.2.3"), "10.1.2.3");
        assert_eq!(counted("::ffff:10.1.2.3"), "10.1.2.3");
        assert_eq!(counted("2001:db8:1:2:aaaa::1"), "2001:db8:1:2::");
    }
}
