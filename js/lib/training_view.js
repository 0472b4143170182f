/** The panel's elements: what a training looks like on its node. */

import { Curve } from "./curves.js"
import { element } from "./elements.js"
import { say } from "./texts.js"
import { timeLeft } from "./trainings.js"

const HINT = "Run, and watch the training here."
const LOSSES = ["noise", "attention", "leak"]
const STOP = "End the training now, and go on with what it has learned so far"
const ENDED = { finished: "learned", stopped: "stopped and kept" }

/** Heights in pixels, of the styles in training_panel.css. */
const IDLE_HEIGHT = 38
const FAILED_HEIGHT = 157
const HEIGHT_WITHOUT_PICTURES = 183
const PICTURES = { sides: 56, least: 88, most: 220 }

/** A square picture with a line of text under it. */
class Picture {
    /** @param {string} caption */
    constructor(caption) {
        const alt = say(caption)
        const properties = { className: "sefi-image", alt, draggable: false, hidden: true }
        this.image = element("img", properties)
        const frame = element("div", { className: "sefi-frame" }, this.image)
        const text = element("figcaption", { className: "sefi-caption", textContent: alt })
        this.element = element("figure", { className: "sefi-picture" }, frame, text)
    }

    /** @param {string} address empty for none */
    show(address) {
        this.image.hidden = !address
        if (address && this.image.getAttribute("src") !== address) this.image.src = address
    }
}

/** The panel of one node. */
export class TrainingView {
    /**
     * @param {(training: object, name: string) => string} addressOf a picture's
     * @param {(training: object) => Promise<string>} stop asks for it; gives why not, or ""
     */
    constructor(addressOf, stop) {
        this.addressOf = addressOf
        this.training = null
        this.pictures = named(["photo", "attention", "preview"], (name) => new Picture(name))
        this.curves = named(LOSSES, (name) => new Curve(name))
        this.hint = element("div", { className: "sefi-hint", textContent: say(HINT) })
        this.heading = element("span", { className: "sefi-heading" })
        this.doing = element("span", { className: "sefi-doing" })
        this.place = element("span", { className: "sefi-place" })
        this.bar = element("div", { className: "sefi-bar" })
        const progress = { className: "sefi-progress", role: "progressbar" }
        this.progress = element("div", progress, this.bar)
        this.message = element("div", { className: "sefi-message", role: "status" })
        this.button = element("button", { className: "sefi-stop", type: "button", title: say(STOP) })
        this.button.addEventListener("click", () => this.askToStop(stop))
        const row = (className, ...children) => element("div", { className }, ...children)
        const elements = (parts) => Object.values(parts).map((part) => part.element)
        this.body = element(
            "div",
            { className: "sefi-body", hidden: true },
            row("sefi-head", this.heading, this.doing, this.place),
            this.progress,
            row("sefi-pictures", ...elements(this.pictures)),
            row("sefi-curves", ...elements(this.curves)),
            row("sefi-foot", this.message, this.button),
        )
        this.element = element("div", { className: "sefi-training" }, this.hint, this.body)
    }

    /**
     * @param {number} width of the node
     * @returns {number} height that the panel takes on a node drawn on the canvas
     */
    height(width) {
        if (!this.training) return IDLE_HEIGHT
        if (isBare(this.training)) return FAILED_HEIGHT
        const { sides, least, most } = PICTURES
        return HEIGHT_WITHOUT_PICTURES + Math.min(most, Math.max(least, (width - sides) / 3))
    }

    /** @param {object|null} training null shows the hint */
    show(training) {
        const other = training?.prompt_id !== this.training?.prompt_id
        if (other || training?.state !== this.training?.state) this.refused = ""
        if (other) this.asked = false
        this.training = training
        this.hint.hidden = !!training
        this.body.hidden = !training
        if (!training) return
        const { state, step, steps, placeholder } = training
        const running = state === "running"
        this.element.dataset.state = isBare(training) ? "bare" : state
        this.heading.textContent = placeholder
        this.doing.textContent = say(running ? training.phase : (ENDED[state] ?? state))
        this.place.textContent = say(`step ${step} of ${steps}`)
        this.bar.style.width = `${steps ? (100 * step) / steps : 0}%`
        Object.assign(this.progress, { ariaValueNow: String(step), ariaValueMax: String(steps) })
        for (const [name, picture] of Object.entries(this.pictures))
            picture.show(training.pictures[name] ? this.addressOf(training, name) : "")
        for (const [name, curve] of Object.entries(this.curves))
            curve.show(training.losses[name] ?? [], step, steps)
        this.showFoot()
    }

    showFoot() {
        const { state, message, resumable, phase, seconds_left } = this.training
        const running = state === "running"
        this.button.hidden = !running
        this.button.disabled = this.asked
        this.button.textContent = say(this.asked ? "Stopping ..." : "Stop and keep")
        const left = running && phase === "learning" ? timeLeft(seconds_left) : ""
        const again = resumable && state === "failed"
        const offer = again ? `Queue it again to go on from step ${resumable}.` : ""
        const said = [this.refused || message, left, offer].filter(Boolean)
        this.message.textContent = said.map((text) => asSentence(say(text))).join(" ")
        this.message.title = this.message.textContent
    }

    /** @param {(training: object) => Promise<string>} stop */
    async askToStop(stop) {
        const { training } = this
        this.asked = true
        this.showFoot()
        const refused = await stop(training)
        if (this.training?.prompt_id !== training.prompt_id) return
        this.refused = refused
        if (refused) this.asked = false
        this.showFoot()
    }
}

/**
 * @param {string} text
 * @returns {string} with a capital and a full stop
 */
function asSentence(text) {
    const begun = text[0].toUpperCase() + text.slice(1)
    if (/[.!?。]$/.test(begun)) return begun
    return begun + (/\p{Script=Han}$/u.test(begun) ? "。" : ".")
}

/**
 * @template Part
 * @param {string[]} names
 * @param {(name: string) => Part} make
 * @returns {Object<string, Part>}
 */
function named(names, make) {
    return Object.fromEntries(names.map((name) => [name, make(name)]))
}

/**
 * @param {object} training
 * @returns {boolean} whether it failed with nothing to show but why
 */
function isBare({ state, step }) {
    return state === "failed" && step === 0
}
