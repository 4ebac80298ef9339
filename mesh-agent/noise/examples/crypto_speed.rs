//! How fast bursts are sealed and opened, by each engine: GB/s of text on one core, medians of interleaved rounds.
//!
//! ```text
//! cargo run --release -p mesh-noise --example crypto_speed [ROUNDS]
//! ```

use std::time::{Duration, Instant};

use mesh_noise::lanes::{Engine, Packet, TAG};

const ENGINES: [Engine; 2] = [Engine::Ring, Engine::Avx512];
const LENGTHS: [usize; 4] = [64, 256, 1420, 8920];
const BURSTS: [usize; 6] = [1, 2, 4, 6, 16, 47];

/// How long one engine runs in one round: short, so that most rounds are not interrupted by other programs.
const SLICE: Duration = Duration::from_micros(200);

fn main() -> Result<(), std::num::ParseIntError> {
    let rounds = std::env::args().nth(1).map_or(Ok(201), |rounds| rounds.parse())?;
    let engines: Vec<Engine> = ENGINES.into_iter().filter(|engine| engine.is_supported()).collect();
    println!("GB/s, medians of {rounds} rounds; to ring in brackets");
    for open in [false, true] {
        for length in LENGTHS {
            for burst in BURSTS {
                let mut speeds = vec![Vec::new(); engines.len()];
                for _ in 0..rounds {
                    for (engine, speeds) in engines.iter().zip(&mut speeds) {
                        speeds.push(speed(*engine, length, burst, open));
                    }
                }
                let medians: Vec<f64> = speeds.iter_mut().map(|speeds| median(speeds)).collect();
                print!("{} {length:>5} B x {burst:>2}", if open { "open" } else { "seal" });
                for (engine, median) in engines.iter().zip(&medians) {
                    print!("   {engine:?} {median:6.3} ({:.2})", median / medians[0]);
                }
                println!();
            }
        }
    }
    Ok(())
}

fn speed(engine: Engine, length: usize, burst: usize, open: bool) -> f64 {
    let key = [7; 32];
    let mut memory = vec![0_u8; burst * 2048.max(length + 64)];
    let stride = memory.len() / burst;
    let mut packets: Vec<Packet<'_>> = memory
        .chunks_mut(stride)
        .enumerate()
        .map(|(n, bytes)| Packet { counter: n as u64, bytes: &mut bytes[16..][..length + TAG] })
        .collect();
    let mut authentic = vec![false; burst];
    engine.seal(&key, &mut packets);
    let sealed: Vec<u8> = packets.iter().flat_map(|packet| packet.bytes.iter().copied()).collect();
    let (mut spent, mut bursts) = (Duration::ZERO, 0);
    while spent < SLICE {
        if open {
            // Opening uses the packets up; to copy them back is not part of it.
            for (packet, sealed) in packets.iter_mut().zip(sealed.chunks(length + TAG)) {
                packet.bytes.copy_from_slice(sealed);
            }
        }
        let times = if open { 1 } else { 4 };
        let start = Instant::now();
        for _ in 0..times {
            if open {
                engine.open(&key, &mut packets, &mut authentic);
            } else {
                engine.seal(&key, &mut packets);
            }
        }
        spent += start.elapsed();
        bursts += times;
        assert!(!open || authentic.iter().all(|authentic| *authentic));
    }
    (bursts * burst * length) as f64 / spent.as_secs_f64() / 1e9
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
