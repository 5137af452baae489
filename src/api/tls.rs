//! HTTPS: rustls over the accepted socket, HTTP/2 by ALPN, and a certificate that is read again when it changes.
//!
//! Streams over TLS stay with hyper, as those over HTTP/2 do: what a stream on its own socket saves, the session's buffers
//! take many times over.

use super::auth::{Stamp, stamp};
use crate::error::Error;
use parking_lot::RwLock;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring::{default_provider, sign::any_supported_type};
use tokio_rustls::rustls::server::{ClientHello, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{self, ServerConfig, crypto::CryptoProvider};

/// How often the files are looked at.
const POLL: Duration = Duration::from_secs(10);

/// The certificate in use. Read by each handshake, replaced when the files change: hence the lock.
#[derive(Debug)]
struct Current(RwLock<Arc<CertifiedKey>>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.read()))
    }
}

/// Makes handshakes; see the module.
#[derive(Clone, Debug)]
pub struct Tls {
    current: Arc<Current>,
    cert: PathBuf,
    key: PathBuf,
    /// What the files were before they were read: they may change before [`Self::keep_fresh`] looks.
    seen: [Option<Stamp>; 2],
    provider: Arc<CryptoProvider>,
}

impl Tls {
    /// Reads the certificate chain and the key. Fails when they are not PEM or do not belong together.
    pub fn new(cert: &Path, key: &Path) -> Result<Self, Error> {
        let provider = Arc::new(default_provider());
        let seen = [cert, key].map(stamp);
        let current = Arc::new(Current(RwLock::new(read(cert, key)?)));
        Ok(Self { current, cert: cert.to_owned(), key: key.to_owned(), seen, provider })
    }

    /// What accepts connections.
    pub fn acceptor(&self) -> Result<TlsAcceptor, Error> {
        let config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::Config(format!("TLS cannot be set up: {error}")))?;
        let mut config = config.with_no_client_auth().with_cert_resolver(Arc::clone(&self.current) as Arc<_>);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }

    /// Takes over changed files. Never ends.
    pub async fn keep_fresh(self) {
        let stamps = || [&self.cert, &self.key].map(|path| stamp(path));
        let mut seen = self.seen;
        let mut told = seen;
        loop {
            tokio::time::sleep(POLL).await;
            let now = stamps();
            if now == seen {
                continue;
            }
            match read(&self.cert, &self.key) {
                Ok(new) => {
                    *self.current.0.write() = new;
                    seen = now;
                    tracing::info!("the certificate has changed");
                }
                // Perhaps only one of the two is written yet: it is tried again, and told once.
                Err(_) if told == now => {}
                Err(error) => {
                    told = now;
                    tracing::error!(%error, "the certificate has changed and cannot be used; the old one stays")
                }
            }
        }
    }
}

fn read(cert: &Path, key: &Path) -> Result<Arc<CertifiedKey>, Error> {
    let bad = |setting: &str, path: &Path, text: String| Error::Config(format!("{setting} = {path:?} {text}"));
    let bad_cert = |text| bad("tls_cert", cert, text);
    let bad_key = |text| bad("tls_key", key, text);
    let chain = CertificateDer::pem_slice_iter(&read_file("tls_cert", cert)?).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(|error| {
        bad_cert(format!("is broken ({error}): name the file of the certificate chain as PEM, as it was issued"))
    })?;
    if chain.is_empty() {
        return Err(bad_cert(
            "holds no certificate: name the file of the chain as PEM, which begins with -----BEGIN CERTIFICATE-----"
                .into(),
        ));
    }
    let private = PrivateKeyDer::from_pem_slice(&read_file("tls_key", key)?).map_err(|_| {
        bad_key(
            "holds no private key: name its file as PEM, which begins with -----BEGIN PRIVATE KEY----- (one with a passphrase is opened by: openssl pkey -in FILE -out NEW)"
                .into(),
        )
    })?;
    let signer = any_supported_type(&private).map_err(|error| {
        bad_key(format!("holds a key of no use here ({error}): RSA, ECDSA of P-256 or P-384, or Ed25519 are taken"))
    })?;
    let certified = CertifiedKey::new(chain, signer);
    certified.keys_match().map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => {
            bad_key(format!("is not the key of the certificate in tls_cert = {cert:?}: name two that belong together"))
        }
        other => bad_cert(format!("holds a broken certificate ({other}): name the file as it was issued")),
    })?;
    Ok(Arc::new(certified))
}

fn read_file(setting: &str, path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|error| {
        let advice = match error.kind() {
            std::io::ErrorKind::PermissionDenied => "let the user that runs the server read it",
            _ => "name a file as PEM that the server can read",
        };
        Error::Config(format!("{setting} = {path:?} cannot be read ({error}): {advice}"))
    })
}
