//! Certificates for a cluster's parts and its users: an authority of its own, and what it signs.
//!
//! For clusters without a certificate manager; any other authority's PEM files serve as well.

use crate::args::Certificate;
use anyhow::{Context, Result};
use heddle_storage::tls::{AUTHORITY, CERTIFICATE, KEY};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use time::{Duration, OffsetDateTime};

/// The authority's private key, beside its certificate.
const AUTHORITY_KEY: &str = "ca-key.pem";
/// An authority outlives what it signs.
const AUTHORITY_DAYS: i64 = 3650;
/// Clocks of two machines may differ so much.
const SKEW: Duration = Duration::HOUR;

/// `heddle certificate`: makes the authority if there is none, and one part's credentials.
pub fn run(command: &Certificate) -> Result<()> {
    issue(&command.authority, &command.out, &command.hosts, command.days)?;
    eprintln!(
        "{}: for {}, {} days; start the part with --tls {}",
        command.out.display(),
        command.hosts.join(", "),
        command.days,
        command.out.display()
    );
    Ok(())
}

/// Writes the credentials of a part that is reached as `hosts` (names or IP addresses) to
/// `out`, signed by the authority in `authority`, which is made if it is not there.
pub fn issue(authority: &Path, out: &Path, hosts: &[String], days: i64) -> Result<()> {
    let (authority_pem, issuer) = authority_of(authority)?;
    let key = KeyPair::generate().context("make a key")?;
    let mut params = params("heddle part", hosts, days)?;
    // A part serves and calls.
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    let certificate = params.signed_by(&key, &issuer).context("sign the certificate")?;
    std::fs::create_dir_all(out).with_context(|| format!("create {}", out.display()))?;
    write(&out.join(KEY), &key.serialize_pem(), true)?;
    write(&out.join(CERTIFICATE), &certificate.pem(), false)?;
    write(&out.join(AUTHORITY), &authority_pem, false)
}

fn authority_of(dir: &Path) -> Result<(String, Issuer<'static, KeyPair>)> {
    let (certificate_path, key_path) = (dir.join(AUTHORITY), dir.join(AUTHORITY_KEY));
    if !key_path.exists() {
        let key = KeyPair::generate().context("make the authority's key")?;
        let mut params = params("heddle authority", &[], AUTHORITY_DAYS)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).context("sign the authority's certificate")?;
        std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        // The key last: without it the authority is made again.
        write(&certificate_path, &certificate.pem(), false)?;
        write(&key_path, &key.serialize_pem(), true)?;
    }
    let read =
        |path: &Path| std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()));
    let (certificate, key) = (read(&certificate_path)?, read(&key_path)?);
    let key = KeyPair::from_pem(&key).with_context(|| format!("{} holds no key", key_path.display()))?;
    let issuer = Issuer::from_ca_cert_pem(&certificate, key)
        .with_context(|| format!("{} holds no certificate", certificate_path.display()))?;
    Ok((certificate, issuer))
}

fn params(name: &str, hosts: &[String], days: i64) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(hosts).context("a host's name or address")?;
    params.distinguished_name.push(DnType::CommonName, name);
    let now = OffsetDateTime::now_utc();
    params.not_before = now - SKEW;
    params.not_after = now + Duration::days(days);
    Ok(params)
}

/// Writes a file that is whole at its name; a secret one for its owner's eyes alone.
fn write(path: &Path, text: &str, is_secret: bool) -> Result<()> {
    let part = path.with_extension("part");
    let mode = if is_secret { 0o600 } else { 0o644 };
    let _left = std::fs::remove_file(&part);
    let written = std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&part);
    let written = written.and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()));
    written.and_then(|()| std::fs::rename(&part, path)).with_context(|| format!("write {}", path.display()))
}
