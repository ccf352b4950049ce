//! Logs to stderr by `RUST_LOG`; traces by OTLP where the standard `OTEL_*` variables say so.

use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

/// What has to be stopped at the end.
pub struct Telemetry {
    provider: Option<SdkTracerProvider>,
}

/// Starts logging, and tracing if an OTLP endpoint is named.
pub fn start() -> Telemetry {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    let log = fmt::layer().with_writer(std::io::stderr).with_target(false).with_filter(filter);
    let is_named = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"]
        .iter()
        .any(|name| std::env::var_os(name).is_some());
    let provider = is_named.then(exporter).flatten();
    let spans = provider.as_ref().map(|provider| {
        // Spans of the exporter's own transport would make spans for ever.
        let filter = EnvFilter::new("info,h2=off,hyper=off,tonic=off,tower=off");
        tracing_opentelemetry::layer().with_tracer(provider.tracer("heddle")).with_filter(filter)
    });
    // Only fails if a subscriber is set already, which the first line of main rules out.
    let _ = tracing_subscriber::registry().with(log).with(spans).try_init();
    Telemetry { provider }
}

fn exporter() -> Option<SdkTracerProvider> {
    match opentelemetry_otlp::SpanExporter::builder().with_tonic().build() {
        Ok(exporter) => Some(SdkTracerProvider::builder().with_batch_exporter(exporter).build()),
        Err(error) => {
            eprintln!("heddle: traces are not exported: {error}");
            None
        }
    }
}

impl Telemetry {
    /// Sends what is left.
    pub async fn stop(self) {
        if let Some(provider) = self.provider {
            let _ = tokio::task::spawn_blocking(move || provider.shutdown()).await;
        }
    }
}
