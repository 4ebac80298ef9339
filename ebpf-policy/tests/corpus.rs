//! Replays the fuzz target's corpus, and writes it anew from the packet builder when asked to (MARGAY_WRITE_CORPUS=1).

#![allow(clippy::unwrap_used, unreachable_pub, reason = "tests")]

mod common;

#[path = "../fuzz/checks.rs"]
mod checks;

use std::path::Path;

use common::packet::Spec;

/// One packet of each kind that the parser tells apart.
fn seeds() -> Vec<(String, Vec<u8>)> {
    let mut seeds = Vec::new();
    for (family, source, destination) in [("v4", "10.0.0.1", "10.0.0.2"), ("v6", "fd00::1", "fd00::2")] {
        let base = Spec::new(source.parse().unwrap(), destination.parse().unwrap(), 6, (40_000, 80));
        let icmp = if family == "v4" { 1 } else { 58 };
        let quoting = Spec {
            protocol: icmp,
            icmp: if family == "v4" { (3, 4) } else { (2, 0) },
            payload: base.ip(),
            ..base.clone()
        };
        let mut add = |name: &str, spec: &Spec| {
            seeds.push((format!("{name}-{family}"), spec.frame()));
            seeds.push((format!("{name}-{family}-tunnel"), spec.ip()));
        };
        add("tcp-syn", &Spec { flags: 2, ..base.clone() });
        add("udp", &Spec { protocol: 17, ..base.clone() });
        add("sctp-init", &Spec { protocol: 132, flags: 1, ..base.clone() });
        add(
            "echo",
            &Spec { protocol: icmp, icmp: if family == "v4" { (8, 0) } else { (128, 0) }, ..base.clone() },
        );
        add("icmp-error", &quoting);
        add("first-fragment", &Spec { fragment: Some((1, 0, true)), ..base.clone() });
        add("later-fragment", &Spec { fragment: Some((1, 185, false)), ..base.clone() });
        add("extensions", &Spec { extensions: 3, fragment: Some((1, 0, true)), ..base.clone() });
        add("solicitation", &Spec { protocol: icmp, icmp: (135, 0), hop_limit: 255, ..base.clone() });
    }
    let mut arp = vec![0xff; 12];
    arp.extend([0x08, 0x06]);
    arp.extend([0; 28]);
    seeds.push(("arp".into(), arp));
    seeds.push(("vlan".into(), [&[0xee; 12][..], &[0x81, 0, 0, 1, 8, 0]].concat()));
    seeds
}

#[test]
fn every_packet_of_the_corpus_and_every_cut_of_it_is_judged_soundly() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/packet");
    if std::env::var_os("MARGAY_WRITE_CORPUS").is_some() {
        for (name, bytes) in seeds() {
            std::fs::write(corpus.join(name), bytes).unwrap();
        }
    }
    let mut replayed = 0;
    for entry in std::fs::read_dir(&corpus).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        for length in 0..=bytes.len() {
            checks::packet(bytes.get(..length).unwrap());
        }
        // Each byte turned over, one at a time.
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed.get_mut(at).into_iter().for_each(|byte| *byte ^= 0xff);
            checks::packet(&changed);
        }
        replayed += 1;
    }
    assert!(replayed >= seeds().len(), "the corpus is not complete: {replayed}");
}
