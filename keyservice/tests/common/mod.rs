//! Nodes for tests, by small numbers.
#![allow(dead_code, clippy::unwrap_used, missing_docs, unreachable_pub)]

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use keyservice::admission::Rules;
use keyservice::{Announcement, Authority, Claim, KeyClaim, PrivateKey, PublicKey};

pub fn key(n: u8) -> PublicKey {
    PrivateKey::from_bytes(&[n; 32]).public()
}

pub fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

pub fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| net(text)).collect()
}

pub fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub fn announcement(name: &str, keys: &[u8], prefixes: &[&str]) -> Announcement {
    let claim =
        |(i, n): (usize, &u8)| KeyClaim { public_key: key(*n), port: 51820 + i as u16, epoch: 10 - i as u64 };
    Announcement {
        name: name.to_owned(),
        keys: keys.iter().enumerate().map(claim).collect(),
        endpoints: vec!["192.0.2.1:51820".parse().unwrap()],
        capabilities: BTreeSet::from(["wireguard".to_owned()]),
        pod_cidrs: nets(prefixes),
        signature: None,
    }
}

/// A claim without an authority.
pub fn plain(name: &str, keys: &[u8], prefixes: &[&str]) -> Claim {
    Claim { announcement: announcement(name, keys, prefixes), authority: Authority::default(), signer: None }
}

/// A claim whose prefixes are its authority's.
pub fn backed(name: &str, keys: &[u8], prefixes: &[&str]) -> Claim {
    let authority = Authority { pod_cidrs: nets(prefixes), ..Authority::default() };
    Claim { announcement: announcement(name, keys, &[]), authority, signer: None }
}

pub const OWN: &str = "self";

pub struct Cluster {
    pub own_keys: Vec<PublicKey>,
    pub pools: Vec<IpNet>,
}

impl Default for Cluster {
    fn default() -> Self {
        Self { own_keys: vec![key(100)], pools: nets(&["10.42.0.0/16", "fd42::/48"]) }
    }
}

impl Cluster {
    pub fn rules(&self) -> Rules<'_> {
        Rules {
            own_name: OWN,
            own_keys: &self.own_keys,
            pools: &self.pools,
            synced: true,
            ..Rules::default()
        }
    }
}
