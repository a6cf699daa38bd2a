//! Draws boots as timelines: one lane for each guest, a tick for each exit.

use std::fmt::Write;

use super::{
    boot::{Guest, Report},
    trace::Kind,
};

const WIDTH: f64 = 960.0;
const LEFT: f64 = 90.0;
const LANE: f64 = 84.0;
const TICKS: f64 = 34.0;

/// The picture as an SVG document. Times run from the first instruction of each
/// VM; each lane has the same scale.
pub fn timeline(report: &Report) -> String {
    let longest = report
        .guests
        .iter()
        .map(|guest| guest.ready_after)
        .max()
        .unwrap_or(1)
        .max(1);
    let scale = |time: u64| LEFT + time as f64 / longest as f64 * (WIDTH - LEFT - 20.0);
    let height = 60.0 + LANE * report.guests.len() as f64 + 50.0;
    let mut svg = String::new();
    let mut put = |text: String| svg.push_str(&text);
    put(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\" fill=\"#24292f\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"{LEFT}\" y=\"24\" font-size=\"15\">From power-on to an open VMBus device, \
         exit by exit</text>\n"
    ));
    for (index, guest) in report.guests.iter().enumerate() {
        let top = 44.0 + LANE * index as f64;
        put(lane(guest, top, &scale));
    }
    put(legend(44.0 + LANE * report.guests.len() as f64 + 12.0));
    put(format!(
        "<text x=\"{LEFT}\" y=\"{:.0}\" fill=\"#57606a\">full width: {:.3} x 10^9 {}; \
         one tick is one VM exit</text>\n</svg>\n",
        height - 10.0,
        longest as f64 / 1e9,
        report.clock
    ));
    svg
}

fn lane(guest: &Guest, top: f64, scale: &impl Fn(u64) -> f64) -> String {
    let mut lane = String::new();
    let mut put = |text: String| lane.push_str(&text);
    put(format!(
        "<text x=\"10\" y=\"{:.0}\" font-weight=\"bold\">{}</text>\n",
        top + TICKS - 8.0,
        guest.name
    ));
    let mut start = 0;
    for (index, phase) in guest.phases.iter().enumerate() {
        let (from, to) = (scale(start), scale(start + phase.length));
        let shade = ["#eaeef2", "#ddf4ff", "#dafbe1"][index.min(2)];
        put(format!(
            "<rect x=\"{from:.1}\" y=\"{top:.0}\" width=\"{:.1}\" height=\"{TICKS:.0}\" \
             fill=\"{shade}\"><title>{}: {} exits</title></rect>\n",
            (to - from).max(0.5),
            phase.name,
            phase.counted
        ));
        start += phase.length;
    }
    // Those that count are drawn last, so on top.
    for kind in Kind::ALL.into_iter().rev() {
        let mut path = String::new();
        let mut last = f64::NEG_INFINITY;
        for (time, _) in guest
            .phases
            .iter()
            .flat_map(|phase| &phase.ticks)
            .filter(|(_, own)| *own == kind)
        {
            let x = scale(*time);
            // Ticks closer than a fifth of a pixel cannot be told apart.
            if x - last > 0.2 {
                // Writing to a string does not fail.
                let _ = write!(path, "M{x:.1} {:.0}v{:.0}", top + 4.0, TICKS - 8.0);
                last = x;
            }
        }
        if !path.is_empty() {
            put(format!(
                "<path d=\"{path}\" stroke=\"{}\" stroke-width=\"0.6\" fill=\"none\"/>\n",
                colour(kind)
            ));
        }
    }
    let parts: Vec<_> = guest
        .phases
        .iter()
        .map(|phase| format!("{}: {} exits", phase.name, phase.counted))
        .collect();
    put(format!(
        "<text x=\"{LEFT}\" y=\"{:.0}\" fill=\"#57606a\">{}</text>\n",
        top + TICKS + 16.0,
        parts.join(", ")
    ));
    lane
}

fn legend(top: f64) -> String {
    let mut legend = String::new();
    let mut x = LEFT;
    for kind in &Kind::ALL {
        // Writing to a string does not fail.
        let _ = writeln!(
            legend,
            "<rect x=\"{x:.0}\" y=\"{top:.0}\" width=\"8\" height=\"8\" fill=\"{}\"/>\
             <text x=\"{:.0}\" y=\"{:.0}\" font-size=\"9\">{}</text>",
            colour(*kind),
            x + 11.0,
            top + 8.0,
            kind.name()
        );
        x += 26.0 + kind.name().len() as f64 * 5.0;
    }
    legend
}

fn colour(kind: Kind) -> &'static str {
    match kind {
        Kind::PageFault => "#0969da",
        Kind::Msr => "#8250df",
        Kind::Hypercall => "#1a7f37",
        Kind::Cpuid => "#bf8700",
        Kind::Port => "#cf222e",
        Kind::Halt => "#24292f",
        Kind::Other => "#bc4c00",
        Kind::HostInterrupt => "#afb8c1",
        Kind::Console => "#d4a0b0",
    }
}
