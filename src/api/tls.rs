//! HTTPS: rustls over the accepted socket, HTTP/2 by ALPN, and a certificate that is read again when it changes.
//!
//! Streams over TLS stay with hyper, as those over HTTP/2 do: what a stream on its own socket saves, the session's buffers
//! take many times over.

use crate::error::Error;
use parking_lot::RwLock;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring::{default_provider, sign::any_supported_type};
use tokio_rustls::rustls::server::{ClientHello, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{ServerConfig, crypto::CryptoProvider};

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
    provider: Arc<CryptoProvider>,
}

impl Tls {
    /// Reads the certificate chain and the key. Fails when they are not PEM or do not belong together.
    pub fn new(cert: &Path, key: &Path) -> Result<Self, Error> {
        let provider = Arc::new(default_provider());
        let current = Arc::new(Current(RwLock::new(read(cert, key)?)));
        Ok(Self { current, cert: cert.to_owned(), key: key.to_owned(), provider })
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
        let mut seen = stamps();
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
                // Perhaps only one of the two is written yet.
                Err(error) => {
                    tracing::error!(%error, "the certificate has changed and cannot be used; the old one stays")
                }
            }
        }
    }
}

fn stamp(path: &Path) -> Option<(SystemTime, u64)> {
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.modified().ok()?, meta.len()))
}

fn read(cert: &Path, key: &Path) -> Result<Arc<CertifiedKey>, Error> {
    let bad = |path: &Path, error: &dyn std::fmt::Display| Error::Config(format!("{}: {error}", path.display()));
    let chain: Vec<_> = CertificateDer::pem_file_iter(cert)
        .and_then(Iterator::collect)
        .map_err(|error| bad(cert, &format!("not a certificate as PEM: {error}")))?;
    if chain.is_empty() {
        return Err(bad(cert, &"it holds no certificate"));
    }
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| bad(key, &format!("not a key as PEM: {error}")))?;
    let signer = any_supported_type(&private).map_err(|error| bad(key, &error))?;
    let certified = CertifiedKey::new(chain, signer);
    certified.keys_match().map_err(|error| bad(key, &format!("it does not belong to the certificate: {error}")))?;
    Ok(Arc::new(certified))
}
