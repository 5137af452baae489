//! HTTPS for the client: whom it believes, and what it says when it cannot.
//!
//! There is no way to believe anybody: a certificate that cannot be checked protects from nobody who can get between.

use super::{CannotConnect, WrongServer};
use anyhow::{Context, bail};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::{CertificateError, ClientConfig, Error, RootCertStore};

/// Who accepts a connection and then says nothing does not speak TLS.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// What a handshake needs.
#[derive(Clone, Debug)]
pub(super) struct Tls {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    /// The file of the only authorities to believe; `None` = the system's.
    ca_cert: Option<PathBuf>,
}

impl Tls {
    /// For a server of this name. Reads the certificates of the authorities: about a quarter of a megabyte on most systems.
    pub(super) fn new(host: &str, ca_cert: Option<&Path>) -> anyhow::Result<Self> {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(bare.to_owned()).with_context(|| format!("{bare:?} is no name of a server"))?;
        let roots = ca_cert.map_or_else(of_the_system, of_file)?;
        let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .context("TLS cannot be set up")?;
        let mut config = config.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { config: Arc::new(config), name, ca_cert: ca_cert.map(Path::to_owned) })
    }

    pub(super) async fn shake(&self, stream: TcpStream, url: &str) -> anyhow::Result<TlsStream<TcpStream>> {
        let connecting = TlsConnector::from(Arc::clone(&self.config)).connect(self.name.clone(), stream);
        let Ok(shaken) = tokio::time::timeout(HANDSHAKE_MAX, connecting).await else {
            return Err(WrongServer(no_tls(url)).into());
        };
        shaken.map_err(|error| match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
            Some(inner) => WrongServer(self.why(inner, url)).into(),
            // Not of TLS's making: a server that is just being restarted ends so too.
            None => CannotConnect { url: url.to_owned(), cause: error }.into(),
        })
    }

    /// What is wrong, and what to do about it.
    fn why(&self, error: &Error, url: &str) -> String {
        use CertificateError as Bad;
        let name = self.name.to_str();
        let bad = match error {
            Error::InvalidCertificate(bad) => bad,
            Error::InvalidMessage(_) => return no_tls(url),
            other => return format!("{url}: TLS failed: {other}"),
        };
        match (bad, &self.ca_cert) {
            (Bad::UnknownIssuer | Bad::BadSignature, None) => format!(
                "the certificate of {url} comes from nobody this machine trusts; if it is your own, --ca-cert FILE (or KISS_CA_CERT) names the certificate it was made with"
            ),
            (Bad::UnknownIssuer | Bad::BadSignature, Some(file)) => format!(
                "the certificate of {url} was not made with {}, which is all that --ca-cert (or KISS_CA_CERT) trusts; name the right file, or leave it out for the system's",
                file.display()
            ),
            (Bad::ExpiredContext { not_after, .. }, _) => {
                format!("the certificate of {url} ended on {}; renew it on the server", time(*not_after))
            }
            // Its end lies before its beginning.
            (Bad::Expired, _) => format!("the certificate of {url} has ended; renew it on the server"),
            (Bad::NotValidYetContext { not_before, .. }, _) => {
                format!("the certificate of {url} begins on {} only; is a clock wrong?", time(*not_before))
            }
            (Bad::NotValidForNameContext { presented, .. }, _) => {
                let presented: Vec<&str> = presented.iter().map(|name| plain(name)).collect();
                let names = if presented.is_empty() { "no name at all".to_owned() } else { presented.join(", ") };
                format!(
                    "the certificate of {url} is for {names}, not for {name}; use such a name in the URL, or have the certificate made for {name} too"
                )
            }
            // An authority's certificate, which most recipes for a self-signed one make, is not a server's (RFC 5280, 4.2.1.9).
            (Bad::Other(other), _) if other.to_string() == "CaUsedAsEndEntity" => format!(
                "the certificate of {url} is an authority's (CA:TRUE), which is not taken for a server's; make it anew with: openssl req -x509 … -addext basicConstraints=critical,CA:FALSE"
            ),
            (other, _) => format!("the certificate of {url} cannot be trusted: {other}"),
        }
    }
}

/// `DnsName("localhost")` as people write it.
fn plain(name: &str) -> &str {
    let inside = name.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')'));
    inside.unwrap_or(name).trim_matches('"')
}

fn no_tls(url: &str) -> String {
    format!("{url} does not speak TLS; if it speaks plain HTTP, the URL begins with http://")
}

fn time(time: UnixTime) -> String {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    jiff::Timestamp::from_second(seconds).map_or_else(|_| seconds.to_string(), |time| time.to_string())
}

fn of_file(path: &Path) -> anyhow::Result<RootCertStore> {
    let file = path.display();
    let bytes =
        std::fs::read(path).with_context(|| format!("cannot read {file}, the file of --ca-cert (KISS_CA_CERT)"))?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&bytes) {
        let added = certificate.map_err(anyhow::Error::from).and_then(|der| Ok(roots.add(der)?));
        added.with_context(|| format!("{file}, the file of --ca-cert (KISS_CA_CERT), holds a broken certificate"))?;
    }
    if roots.is_empty() {
        bail!(
            "{file}, the file of --ca-cert (KISS_CA_CERT), holds no certificate as PEM: it begins with -----BEGIN CERTIFICATE-----"
        );
    }
    Ok(roots)
}

fn of_the_system() -> anyhow::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    // Some systems carry one that is malformed: it counts for nobody.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        bail!(
            "this machine has no certificates of authorities, so no https server can be checked: install ca-certificates, or name the server's by --ca-cert FILE"
        );
    }
    Ok(roots)
}
