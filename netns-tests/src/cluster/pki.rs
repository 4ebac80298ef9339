//! What the API server is known by: an authority of its own, a certificate for its names and addresses, the key that signs
//! service accounts' tokens, and the administrator's token.

use std::net::IpAddr;

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};

use super::PKI;
use crate::host::Host;

/// Names under which an API server is reached inside a cluster.
const NAMES: [&str; 4] = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"];

/// Makes all of it anew in the host's [`PKI`]; the administrator is in `system:masters`, whom RBAC allows everything.
pub(super) fn make(host: &Host, addresses: &[IpAddr]) -> Result<()> {
    let authority = KeyPair::generate().context("make the authority's key")?;
    let mut of_authority = CertificateParams::default();
    of_authority.distinguished_name = named("margay-lab-ca");
    of_authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    of_authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let root = of_authority.self_signed(&authority).context("sign the authority")?;

    let mut names: Vec<String> = NAMES.map(String::from).into();
    names.extend(addresses.iter().map(IpAddr::to_string));
    let key = KeyPair::generate().context("make the API server's key")?;
    let mut of_server = CertificateParams::new(names).context("the API server's names")?;
    of_server.distinguished_name = named("kube-apiserver");
    of_server.use_authority_key_identifier_extension = true;
    let certificate = of_server
        .signed_by(&key, &Issuer::from_params(&of_authority, &authority))
        .context("sign the API server")?;

    let accounts = KeyPair::generate().context("make the key of service accounts")?;
    let token: String = rand::random::<[u8; 16]>().map(|byte| format!("{byte:02x}")).concat();
    host.write(&format!("{PKI}/ca.crt"), root.pem().as_bytes())?;
    host.write(&format!("{PKI}/apiserver.crt"), certificate.pem().as_bytes())?;
    host.write_secret(&format!("{PKI}/apiserver.key"), key.serialize_pem().as_bytes())?;
    host.write_secret(&format!("{PKI}/sa.key"), accounts.serialize_pem().as_bytes())?;
    host.write(&format!("{PKI}/sa.pub"), accounts.public_key_pem().as_bytes())?;
    host.write_secret(
        &format!("{PKI}/tokens.csv"),
        format!("{token},admin,admin,\"system:masters\"\n").as_bytes(),
    )
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}
