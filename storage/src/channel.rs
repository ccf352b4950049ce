//! Connections: one way to reach any part, by TCP or by a Unix socket.

use crate::error::Error;
use crate::tls::Credentials;
use hyper_util::rt::TokioIo;
use std::path::PathBuf;
use std::time::Duration;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status};
use tower::service_fn;

/// Largest gRPC message: a chunk or a batch of blocks, with room.
pub const MESSAGE_BYTES_MAX: usize = 24 << 20;

/// A lazily connected channel to `http://HOST:PORT`, `https://HOST:PORT` or `unix:/PATH`.
///
/// Behind `https` both sides show certificates: see [`Credentials`].
///
/// Keep-alive finds peers that have gone without a word, which a deadline alone does not.
pub fn connect(address: &str) -> Result<Channel, Error> {
    let tune = |endpoint: Endpoint| {
        endpoint
            .connect_timeout(Duration::from_secs(2))
            .tcp_nodelay(true)
            .initial_stream_window_size(8 << 20)
            .initial_connection_window_size(16 << 20)
            .http2_keep_alive_interval(Duration::from_secs(2))
            .keep_alive_timeout(Duration::from_secs(4))
            .keep_alive_while_idle(true)
    };
    match address.strip_prefix("unix:") {
        None => {
            let bad = |what: String| Error::Address { address: address.into(), what };
            let endpoint =
                Endpoint::from_shared(address.to_string()).map_err(|error| bad(error.to_string()))?;
            let is_secure = endpoint.uri().scheme_str() == Some("https");
            let endpoint = match Credentials::ours() {
                Some(ours) if is_secure => {
                    endpoint.tls_config(ours.client()).map_err(|error| bad(chain(&error)))?
                }
                None if is_secure => {
                    return Err(bad("it wants certificates; name their directory by --tls DIR".into()));
                }
                _ => endpoint,
            };
            Ok(tune(endpoint).connect_lazy())
        }
        Some(path) => {
            let path = PathBuf::from(path);
            let endpoint = tune(Endpoint::from_static("http://unix.socket"));
            Ok(endpoint.connect_with_connector_lazy(service_fn(move |_: Uri| {
                let path = path.clone();
                async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
            })))
        }
    }
}

/// An error and its causes in one line: tonic's own says only that the transport failed.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// Whether a call may be made again: the connection, or who answers there, went away.
pub fn is_transient(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal)
}
