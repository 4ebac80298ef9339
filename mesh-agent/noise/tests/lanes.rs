//! Bursts against `ring`, packet by packet, for each engine that this CPU has.

#![allow(clippy::unwrap_used)]

use mesh_noise::lanes::{self, BURST, Engine, Packet, TAG};
use proptest::collection::vec;
use proptest::prelude::*;

#[path = "../../fuzz/lanes_checks.rs"]
#[allow(unreachable_pub)]
mod lanes_checks;

const KEY: [u8; 32] = [
    0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0a, 0x0b, 0x0c, 0x0d, 0x0e, 0x0f, 0x10,
    0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x1b, 0x1c, 0x1d, 0x1e, 0x1f,
];

/// Where a half of a counter, or the counter, ends.
const EDGES: [u64; 5] = [0, (1 << 32) - 20, (1 << 63) - 20, u64::MAX - (1 << 13) - 20, u64::MAX - 20];

/// Those beside `ring`, which is the oracle.
fn engines() -> Vec<Engine> {
    let (has, lacks): (Vec<Engine>, Vec<Engine>) =
        [Engine::Avx512].into_iter().partition(|e| e.is_supported());
    if !lacks.is_empty() {
        eprintln!("NOT TESTED, because this CPU lacks what they need: {lacks:?}");
    }
    has
}

/// Packets of these lengths, with room for their tags, counted from `first`.
fn burst(first: u64, lengths: &[usize]) -> Vec<(u64, Vec<u8>)> {
    let packet = |(n, length): (usize, &usize)| {
        let bytes = (0..length + TAG).map(|at| (at * 31 + n * 7 + at / 256) as u8).collect();
        (first.wrapping_add(n as u64), bytes)
    };
    lengths.iter().enumerate().map(packet).collect()
}

fn packets(burst: &mut [(u64, Vec<u8>)]) -> Vec<Packet<'_>> {
    burst.iter_mut().map(|(counter, bytes)| Packet { counter: *counter, bytes }).collect()
}

fn sealed(engine: Engine, plain: &[(u64, Vec<u8>)]) -> Vec<(u64, Vec<u8>)> {
    let mut burst = plain.to_vec();
    engine.seal(&KEY, &mut packets(&mut burst));
    burst
}

fn opened(engine: Engine, sealed: &[(u64, Vec<u8>)]) -> (Vec<(u64, Vec<u8>)>, Vec<bool>) {
    let mut burst = sealed.to_vec();
    // Whatever was in there before counts for nothing.
    let mut authentic = vec![true; burst.len()];
    engine.open(&KEY, &mut packets(&mut burst), &mut authentic);
    (burst, authentic)
}

fn text(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.len() - TAG]
}

/// Sealed the same as by ring, and opened to what it was.
fn assert_agrees(engine: Engine, first: u64, lengths: &[usize]) {
    let plain = burst(first, lengths);
    let expected = sealed(Engine::Ring, &plain);
    assert!(sealed(engine, &plain) == expected, "{engine:?} seals otherwise: {first} {lengths:?}");
    let (back, authentic) = opened(engine, &expected);
    assert!(
        authentic.iter().all(|authentic| *authentic),
        "{engine:?} refuses: {first} {lengths:?} {authentic:?}"
    );
    for ((_, back), (_, plain)) in back.iter().zip(&plain) {
        assert!(text(back) == text(plain), "{engine:?} opens otherwise: {first} {lengths:?}");
    }
}

/// RFC 8439, 2.4.2: the cipher begins at block 1, as in the AEAD. (The RFC's AEAD vectors have additional data.)
#[test]
fn every_engine_encrypts_as_the_rfc_does() {
    let plain = b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen would be it.";
    let encrypted = "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0bf91b65c5524733ab8f593dabcd62b357\
                     1639d624e65152ab8f530c359f0861d807ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab77937365af9\
                     0bbf74a35be6b40b8eedf2785e42874d";
    for engine in engines().into_iter().chain([Engine::Ring]) {
        for lanes in [1, 2, 16, 33] {
            let packet = [&plain[..], &[0; TAG]].concat();
            let out = sealed(engine, &vec![(0x4a00_0000, packet); lanes]);
            for (_, bytes) in out {
                let hex: String = text(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
                assert_eq!(hex, encrypted, "{engine:?}");
            }
        }
    }
}

#[test]
fn every_length_is_sealed_and_opened_as_by_ring() {
    for engine in engines() {
        for length in 0..=9000 {
            // Alone; and in a burst large enough for the other way to authenticate.
            assert_agrees(engine, length as u64, &[length]);
            if length <= 1600 || length % 61 == 0 {
                assert_agrees(engine, length as u64, &[length; 9]);
            }
        }
    }
}

#[test]
fn every_size_of_burst_is_sealed_and_opened_as_by_ring() {
    for engine in engines() {
        for size in 0..=3 * BURST + 2 {
            for first in EDGES {
                assert_agrees(engine, first, &vec![1424; size]);
                assert_agrees(engine, first, &(0..size).map(|n| n * 97 % 1500).collect::<Vec<_>>());
            }
        }
    }
}

#[test]
fn what_is_changed_in_one_packet_is_refused_in_that_one_only() {
    for engine in engines() {
        for size in [1, 2, 3, 7, 8, 9, 16, 17, 47] {
            for lengths in [vec![1424; size], vec![0; size], (0..size).map(|n| n * 331 % 2000).collect()] {
                let plain = burst(1, &lengths);
                let good = sealed(Engine::Ring, &plain);
                for victim in 0..size {
                    let length = good[victim].1.len();
                    for at in [
                        0,
                        length / 2,
                        (length - TAG).saturating_sub(1),
                        length - TAG,
                        length - 8,
                        length - 1,
                    ] {
                        let mut bad = good.clone();
                        bad[victim].1[at] ^= 1 << (victim % 8);
                        assert_only_refuses(engine, victim, &bad, &plain);
                    }
                    let mut bad = good.clone();
                    bad[victim].0 ^= 1 << (victim * 5 % 64);
                    assert_only_refuses(engine, victim, &bad, &plain);
                }
            }
        }
    }
}

fn assert_only_refuses(engine: Engine, victim: usize, sealed: &[(u64, Vec<u8>)], plain: &[(u64, Vec<u8>)]) {
    let (back, authentic) = opened(engine, sealed);
    for (n, ((_, back), (_, plain))) in back.iter().zip(plain).enumerate() {
        assert_eq!(authentic[n], n != victim, "{engine:?}, {n} of {}", plain.len());
        if n != victim {
            assert!(text(back) == text(plain));
        } else if plain.len() >= 32 + TAG {
            // Not released, not even in part.
            assert!(
                back[..16] != plain[..16]
                    && text(back)[plain.len() - TAG - 16..] != text(plain)[plain.len() - TAG - 16..]
            );
        }
    }
}

/// A short packet is neither authentic nor in its neighbours' way.
#[test]
fn packets_too_short_for_a_tag_are_refused() {
    for engine in engines().into_iter().chain([Engine::Ring]) {
        let mut burst = sealed(Engine::Ring, &burst(5, &[100; 12]));
        for (n, (_, bytes)) in burst.iter_mut().enumerate().step_by(3) {
            bytes.truncate(n);
        }
        let (_, authentic) = opened(engine, &burst);
        assert_eq!(authentic, (0..12).map(|n| n % 3 != 0).collect::<Vec<_>>(), "{engine:?}");
        let short = vec![(1, vec![9; 15]), (2, Vec::new())];
        assert_eq!(sealed(engine, &short), short);
    }
}

/// Nothing beside the packets is written: they lie in one buffer, with a gap between them.
#[test]
fn neighbouring_bytes_stay_as_they_are() {
    for engine in engines() {
        for length in (0..200).chain([1420, 1440]) {
            let mut memory = vec![0xa5; 12 * (length + TAG + 3)];
            let mut packets: Vec<Packet<'_>> = memory
                .chunks_mut(length + TAG + 3)
                .map(|bytes| Packet { counter: 9, bytes: &mut bytes[1..][..length + TAG] })
                .collect();
            engine.seal(&KEY, &mut packets);
            let mut authentic = [false; 12];
            engine.open(&KEY, &mut packets, &mut authentic);
            assert_eq!(authentic, [true; 12]);
            for bytes in memory.chunks(length + TAG + 3) {
                assert!(bytes[0] == 0xa5 && bytes[length + TAG + 1..] == [0xa5; 2], "{engine:?} {length}");
            }
        }
    }
}

/// Every input the fuzzer found worth keeping, through the same check.
#[test]
fn fuzzed_bursts_are_sealed_and_opened_as_by_ring() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/lanes");
    let inputs: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(inputs.len() >= 4, "{}: only {} inputs", folder.display(), inputs.len());
    for input in inputs {
        lanes_checks::lanes(&std::fs::read(input).unwrap());
    }
}

proptest! {
    #[test]
    fn mixed_bursts_are_sealed_and_opened_as_by_ring(
        lengths in vec(prop_oneof![0..=9000_usize, 0..=300_usize, Just(1424), Just(96)], 1..48),
        first in prop_oneof![any::<u64>(), (0..EDGES.len()).prop_map(|n| EDGES[n])],
    ) {
        for engine in engines() {
            assert_agrees(engine, first, &lengths);
        }
    }

    #[test]
    fn the_choice_by_size_of_burst_changes_nothing(lengths in vec(0..=600_usize, 1..18), first: u64) {
        let plain = burst(first, &lengths);
        let expected = sealed(Engine::Ring, &plain);
        let mut chosen = plain.clone();
        lanes::seal(&KEY, &mut packets(&mut chosen));
        prop_assert!(chosen == expected);
        let mut authentic = vec![false; chosen.len()];
        lanes::open(&KEY, &mut packets(&mut chosen), &mut authentic);
        prop_assert!(authentic.iter().all(|authentic| *authentic));
        prop_assert!(chosen.iter().zip(&plain).all(|((_, a), (_, b))| text(a) == text(b)));
    }
}
