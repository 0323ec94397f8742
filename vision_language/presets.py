"""The words behind the preset prompts and enhancement styles of the nodes: names as shared workflows have them."""

from __future__ import annotations

DESCRIPTIONS: dict[str, str] = {
    "🖼️ Tags": (
        "List what this image shows as short tags separated by commas: subject, appearance, clothing, action, place, "
        "light, colours, composition and style. At most 50 tags, none twice, nothing but the tags."
    ),
    "🖼️ Simple Description": "Say in one plain sentence what this image shows.",
    "🖼️ Detailed Description": (
        "Describe this image in one paragraph: the main subject, what it looks like and does, where it is, the light, "
        "the colours and the mood. State only what can be seen."
    ),
    "🖼️ Ultra Detailed Description": (
        "Describe this image as completely as you can in flowing text: every subject with its features, clothing, pose "
        "and expression, the objects around it, the place and its depth, materials and textures, the direction and "
        "quality of the light, the palette, the viewpoint and the style. State only what can be seen."
    ),
    "🎬 Cinematic Description": (
        "Describe this image as a shot of a film: framing, lens and camera position, movement that it suggests, "
        "lighting, colour grade, atmosphere, and the moment of the story that it catches."
    ),
    "🖼️ Detailed Analysis": (
        "Analyse this image in short sections: subject, composition, light and colour, technique and style, mood, and "
        "anything unusual or faulty in it."
    ),
    "📹 Video Summary": (
        "Summarise this video: where it takes place, who or what appears, what happens in which order, and how it ends."
    ),
    "📖 Short Story": "Write a short story of about 150 words that this image could illustrate.",
    "🪄 Prompt Refine & Expand": (
        "Rewrite the following as a rich prompt for an image generator. Keep every fact it names, add fitting detail on "
        "subject, place, light, composition and style, and answer with the prompt only."
    ),
}
DEFAULT_DESCRIPTION = "🖼️ Detailed Description"


# What the same presets were called in earlier releases of the pack that the nodes come from, and in graphs of that time.
EARLIER: dict[str, str] = {
    "Prompt Style - Tags": "🖼️ Tags",
    "Prompt Style - Simple": "🖼️ Simple Description",
    "Prompt Style - Detailed": "🖼️ Detailed Description",
    "Prompt Style - Extreme Detailed": "🖼️ Ultra Detailed Description",
    "Prompt Style - Cinematic": "🎬 Cinematic Description",
    "Creative - Detailed Analysis": "🖼️ Detailed Analysis",
    "Creative - Summarize Video": "📹 Video Summary",
    "Creative - Short Story": "📖 Short Story",
    "Creative - Refine & Expand Prompt": "🪄 Prompt Refine & Expand",
    "🧩Prompt Refine & Expand": "🪄 Prompt Refine & Expand",
}


STYLES: dict[str, str] = {
    "📝 Enhance": (
        "Improve this image prompt: keep its meaning, add concrete visual detail, and answer with the prompt only."
    ),
    "📝 Refine": (
        "Tighten this image prompt: remove repetition and vagueness, keep every detail that can be seen, and answer with "
        "the prompt only."
    ),
    "📝 Creative Rewrite": (
        "Rewrite this image prompt with an unexpected but fitting idea of composition or setting. Keep its subject, and "
        "answer with the prompt only."
    ),
    "📝 Detailed Visual": (
        "Expand this image prompt with exact visual detail on subject, surroundings, materials, light, colours and "
        "camera. Answer with the prompt only."
    ),
    "📝 Artistic Style": (
        "Rewrite this image prompt around one artistic style that suits it, naming medium, technique and palette. Answer "
        "with the prompt only."
    ),
    "📝 Technical Specs": (
        "Rewrite this image prompt with photographic data: lens, aperture, shutter, lighting set-up, film or sensor, and "
        "processing. Answer with the prompt only."
    ),
}
DEFAULT_STYLE = "📝 Enhance"

JSON_REQUEST = "Answer with one JSON value and nothing else."
BOXES_REQUEST = (
    "Answer with a JSON list and nothing else, one entry for each object: "
    '{"bbox_2d": [left, top, right, bottom], "label": "name"}.'
)
EMPTY_PROMPT = "Describe this image."
EMPTY_ENHANCEMENT = "Describe a scene vividly."

# For nodes whose answers are wanted bare.
ANSWER_ALONE = (
    "You look at pictures and videos. Give the answer alone, without thinking aloud and without words about it."
)
PROMPT_ALONE = "Give the finished prompt alone: no preface, no plan, no list, no quotation marks, no markup."
INTO_ENGLISH = (
    "Translate this image prompt into English, as one paragraph. Keep every detail that can be seen, and answer with the "
    "prompt only."
)
