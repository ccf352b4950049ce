//! Mutual TLS between all parts: what a process shows, and by whom it knows the others.
//!
//! A process is one part of one cluster, so it has one set of credentials for all its
//! connections: given once at its start, used by every `https://` address and every TCP
//! listener from then on. Who holds a certificate of the cluster's authority is trusted in
//! full; server names are checked against the certificate's, as HTTPS does.

use crate::error::{Error, IoContext};
use std::path::Path;
use std::sync::OnceLock;
use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};

/// The authority's certificate, in a directory of credentials.
pub const AUTHORITY: &str = "ca.pem";
/// The part's certificate, and those between it and the authority.
pub const CERTIFICATE: &str = "cert.pem";
/// Its private key.
pub const KEY: &str = "key.pem";

/// A part's credentials.
#[derive(Clone)]
pub struct Credentials {
    authority: Certificate,
    identity: Identity,
}

static OURS: OnceLock<Credentials> = OnceLock::new();

impl Credentials {
    /// Reads the three PEM files [`AUTHORITY`], [`CERTIFICATE`] and [`KEY`].
    pub fn load(dir: &Path) -> Result<Credentials, Error> {
        let read = |name: &str, mark: &str| {
            let path = dir.join(name);
            let bytes = std::fs::read(&path).at("read", &path)?;
            // rustls says no more of such a file than that it found nothing.
            match String::from_utf8_lossy(&bytes).contains(mark) {
                true => Ok(bytes),
                false => {
                    Err(Error::Identity { path, what: format!("no \"{mark}\" in it: it is not in PEM") })
                }
            }
        };
        let credentials = Credentials {
            authority: Certificate::from_pem(read(AUTHORITY, "BEGIN CERTIFICATE")?),
            identity: Identity::from_pem(read(CERTIFICATE, "BEGIN CERTIFICATE")?, read(KEY, "PRIVATE KEY")?),
        };
        Ok(credentials)
    }

    /// Makes them this process's own. The first ones stay.
    pub fn adopt(self) {
        let _first_stay = OURS.set(self);
    }

    /// Those that this process has.
    pub fn ours() -> Option<&'static Credentials> {
        OURS.get()
    }

    pub(crate) fn client(&self) -> ClientTlsConfig {
        ClientTlsConfig::new().ca_certificate(self.authority.clone()).identity(self.identity.clone())
    }

    pub(crate) fn server(&self) -> ServerTlsConfig {
        ServerTlsConfig::new().client_ca_root(self.authority.clone()).identity(self.identity.clone())
    }
}

/// `https` or `http`: what the addresses of this process's listeners begin with.
pub fn scheme() -> &'static str {
    if Credentials::ours().is_some() { "https" } else { "http" }
}
