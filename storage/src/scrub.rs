//! Scrub: everything that rows name is read and hashed again, at a bounded rate.

use crate::error::Error;
use crate::mend::Reader;
use crate::schema::locations;
use heddle_proto::v1::ScrubReply;
use std::time::Duration;
use tokio::sync::mpsc::Sender;
use tokio::time::Instant;
use tonic::Status;

/// Rows that are taken at a time.
const STEP: usize = 256;
/// A report is sent after so long.
const REPORT: Duration = Duration::from_millis(500);

/// Scrubs all rows of this replica; reports on the way, and at the end.
pub async fn scrub(reader: &Reader, bytes_per_second: u64, reports: &Sender<Result<ScrubReply, Status>>) {
    let mut report = ScrubReply::default();
    let last = match run(reader, bytes_per_second, reports, &mut report).await {
        Ok(()) => Ok(report),
        Err(error) => Err(Status::data_loss(error.to_string())),
    };
    let _ = reports.send(last).await;
}

async fn run(
    reader: &Reader,
    bytes_per_second: u64,
    reports: &Sender<Result<ScrubReply, Status>>,
    report: &mut ScrubReply,
) -> Result<(), Error> {
    let began = Instant::now();
    let mut reported = began;
    let mut next = Some(vec![]);
    while let Some(from) = next {
        let (rows, then) = reader.catalog.range(&from, &[0xff; 8], STEP)?;
        for (key, value) in rows {
            report.rows += 1;
            for at in locations(&key, &value)? {
                report.parts += 1;
                report.bytes += u64::from(at.bytes);
                if reader.segments.read(at).is_err() {
                    // A row that has changed meanwhile names other bytes.
                    let is_still = reader
                        .catalog
                        .raw(&key)?
                        .is_some_and(|now| locations(&key, &now).is_ok_and(|places| places.contains(&at)));
                    if is_still {
                        report.damaged += 1;
                        report.mended += u64::from(reader.read(&key, at).await.is_ok());
                    }
                }
            }
            if bytes_per_second > 0 {
                let due = began + Duration::from_secs_f64(report.bytes as f64 / bytes_per_second as f64);
                tokio::time::sleep_until(due).await;
            }
            if reported.elapsed() >= REPORT {
                reported = Instant::now();
                if reports.send(Ok(*report)).await.is_err() {
                    return Ok(());
                }
            }
        }
        next = then;
    }
    Ok(())
}
